"""Tiny random models and batches for the tests of etr.hf."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import etr
from etr.hf import FAMILIES, EtrConfig, EtrForCausalLM
from etr.moe import moe_layers
from etr.moe.training import attach

VOCAB, PAD = 64, 0
CLAMP_OPTIONS = hasattr(GptOssConfig(), "swiglu_limit")
LATENT = {  # sizes of DeepSeek's attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
DEEPSEEK = {
    **LATENT,
    "n_routed_experts": 4,
    "moe_intermediate_size": 48,
    "intermediate_size": 40,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 0,
    "n_group": 2,
    "topk_group": 1,
}
BASES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "intermediate_size": 48}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        {
            "num_experts": 4,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 40,
            "intermediate_size": 40,
        },
    ),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 8}),
    "olmoe": (OlmoeConfig, {"num_experts": 4, "intermediate_size": 48}),
    "deepseek_v2": (DeepseekV2Config, {**DEEPSEEK, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": (DeepseekV3Config, {**DEEPSEEK, "num_mtp_layers": 0}),
    "gpt_oss": (
        GptOssConfig,
        {
            "num_local_experts": 4,
            "intermediate_size": 48,
            "head_dim": 8,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            # So that it cuts; older versions of transformers have 7 and 1.702 and no option.
            **({"swiglu_limit": 0.5, "swiglu_alpha": 1.3} if CLAMP_OPTIONS else {}),
        },
    ),
    "granitemoe": (
        GraniteMoeConfig,
        {
            "num_local_experts": 4,
            "intermediate_size": 48,
            "embedding_multiplier": 1.5,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.5,
        },
    ),
}
assert set(BASES) == set(FAMILIES), "every family in the table is tested"


def router_and_family(routers: Iterable[str]) -> list[tuple[str, str]]:
    """Every router with one family, and every family with one router: the two do not interact."""
    first, *others = FAMILIES
    return [*((router, first) for router in routers), *(("etr", family) for family in others)]


def base_config(family: str = "mixtral", **changes: Any) -> PreTrainedConfig:
    """Two layers with experts, H=32, four experts."""
    config_class, extra = BASES[family]
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # so that layers and choices matter
    }
    return config_class(**{**sizes, **extra, **changes})


def etr_config(router: Any = "etr", family: str = "mixtral", **options: Any) -> EtrConfig:
    """A config with the largest top_k up to 2 that the router is defined for."""
    base = base_config(family)
    if "top_k" in options:
        return EtrConfig.from_base(base, router, **options)
    options["top_k"] = 1 if router in ("baseline", "locmoe") else 2
    return EtrConfig.from_base(base, router, **options)


def family_model(family: str, **changes: Any) -> PreTrainedModel:
    """Transformers' own model in eval mode, in float32, with random biases too."""
    model = AutoModelForCausalLM.from_config(base_config(family, **changes)).eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "bias" in name:
            value.data.normal_(std=0.3)
    return model


class InFloat64(TorchFunctionMode):
    """Makes every conversion to float32 one to float64: families round probabilities and norms."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        kwargs = {k: _wide(v) for k, v in (kwargs or {}).items()}
        return func(*map(_wide, args), **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def make_model(
    router: Any = "etr", family: str = "mixtral", seed: int = 0, **options: Any
) -> EtrForCausalLM:
    """A float64 model in training mode."""
    torch.manual_seed(seed)
    return EtrForCausalLM(etr_config(router, family, **options)).double().train()


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    """Random token ids without special tokens, int64 [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def train_steps(
    model: EtrForCausalLM, optimizer: torch.optim.Optimizer, first: int, last: int
) -> list[float]:
    """Optimizer steps `first` to `last` - 1 on batches that depend on the step's number alone."""
    losses = []
    for step in range(first, last):
        x = tokens(batch=4, length=16, seed=100 + step)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def calibrated(model: EtrForCausalLM, steps: int = 3) -> EtrForCausalLM:
    """Train a few steps, so that thresholds drop some tokens, and switch to eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = attach(model, optimizer, steps)
    train_steps(model, optimizer, 0, steps)
    handle.detach()
    return quiet_eval(model)


def quiet_eval(model: EtrForCausalLM) -> EtrForCausalLM:
    """Eval mode without the warning about dropless evaluation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.eval()


def pending(model: EtrForCausalLM) -> list[dict[str, Tensor]]:
    """Counters that wait for the next optimizer step."""
    return [layer.pending for layer in moe_layers(model)]


def traits(router: str) -> Any:
    """Traits of a router at default options."""
    return etr.ROUTERS[router]().traits
