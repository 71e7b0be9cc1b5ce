"""From a ModelConfig to a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from etr.hf import EtrConfig, EtrForCausalLM
from etr.moe.config import SIZES
from etr.train.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SaveDtype = Literal["float32", "checkpoint"]
"""Data type of the weights that a training from a checkpoint saves."""


def build_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int
) -> EtrForCausalLM:
    """A freshly initialised model.

    Models that differ in their router alone start from the same attention, embedding and expert
    weights, because routers draw theirs from a stream of their own.

    Args:
        config: sizes and routing.
        tokenizer: gives the vocabulary and special ids.
        max_length: longest sequence, tokens.
        seed: of the initial weights.
    """
    from transformers import MixtralConfig

    moe = config.moe_config()
    base = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=moe.hidden_size,
        intermediate_size=moe.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_key_value_heads,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        max_position_embeddings=max_length,
        tie_word_embeddings=config.tie_embeddings,
        sliding_window=None,
        initializer_range=config.initializer_range or config.hidden_size**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    options = {name: value for name, value in moe.to_dict().items() if name not in SIZES}
    etr_config = EtrConfig(base_config=base, moe=options)
    torch.manual_seed(seed)
    return EtrForCausalLM(etr_config)


def widen_weights(model: nn.Module) -> torch.dtype:
    """Make bf16 and fp16 weights float32, in place, as a model that trains needs them.

    Steps of a usual learning rate are smaller than half the distance of two neighbours in bf16,
    and would mostly be rounded away. Whatever trains a model that was loaded calls this first; to
    compute in bf16 is autocast's part.

    Args:
        model: of this library or of transformers; wider weights stay, and so does routing state.
    Returns:
        The data type that the weights had.
    """
    before = next(model.parameters()).dtype
    if any(p.is_floating_point() and p.dtype.itemsize < 4 for p in model.parameters()):
        model.float()
    return before


def find_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is the accelerator where there is one, else the CPU.

    Raises:
        ValueError: there is no such device on this machine.
    """
    own = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    best = own or torch.device("cpu")
    if name == "auto":
        return best
    try:
        if torch.empty(0, device=name).is_meta:
            raise RuntimeError("the meta device computes nothing")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device={name!r} is not on this machine ({str(error).splitlines()[0]}); use auto, "
            f"which takes {best.type} here"
        ) from error
    return torch.device(name)


def enable_checkpointing(model: EtrForCausalLM) -> None:
    """Recompute activations in the backward pass."""
    # Renamed in later versions of transformers, which deprecate the old name.
    old = model.gradient_checkpointing_enable
    getattr(model, "activation_checkpointing_enable", old)()
