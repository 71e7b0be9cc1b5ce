"""What a row of the table of families says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from etr.hf.layouts import LAYOUTS
from etr.moe.experts import Activation
from etr.moe.routers.token_choice import TokenChoice

GATED_ACTIVATIONS: dict[str, Activation] = {"silu": "swiglu", "swish": "swiglu"}
"""The layer's activation for each gated activation of transformers."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One parameter of the MoE block, here and in the family's checkpoints."""

    ours: str
    """Name within the layer, such as ``experts.gate_up_proj``."""
    theirs: tuple[str, ...]
    """Names on disk within a decoder layer, each with ``*`` for the number of the expert where
    every expert has a tensor of its own; several are parts of ours."""
    layout: str = "same"
    """Name in `LAYOUTS`: how their tensors become ours and back."""
    fused: str | None = None
    """Name of the one tensor of our shape that transformers holds in memory where the disk has
    several, or another name; it is read too."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} must be one of {', '.join(LAYOUTS)}")


def activation_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Options of experts with nothing but the config's activation; None where it is not known."""
    return {"activation": GATED_ACTIVATIONS.get(config.hidden_act)}


def softmax_top_k(config: PreTrainedConfig) -> dict[str, Any]:
    """A plain linear router; weights are normalised where the config says so."""
    chosen = getattr(config, "norm_topk_prob", True)
    return {"router": TokenChoice(), "normalize": "chosen" if chosen else "none"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to find the MoE blocks of one transformers model type, and what they are."""

    model_type: str
    """As in the family's config."""
    keys: tuple[Key, ...]
    """Every parameter of the block."""
    block: str = "mlp"
    """Attribute of a decoder layer that holds its MoE block; a layer whose block has no experts
    is dense and stays as it is."""
    router_name: str = "gate"
    """Attribute of the block that holds its router."""
    num_experts: str = "num_experts"
    """Name of the config's attribute."""
    top_k: str = "num_experts_per_tok"
    """Name of the config's attribute."""
    intermediate_size: str = "intermediate_size"
    """Name of the config's attribute."""
    aux_coefficient: str | None = "router_aux_loss_coef"
    """Name of the attribute with the weight of the family's own balance loss, or None where it
    has none."""
    jitter: str | None = None
    """Name of the attribute with the noise on the block's input in training, or None."""
    options: tuple[str, ...] = ()
    """Names of further attributes that say what the block computes."""
    logits_divisor: str | None = None
    """Name of the attribute that divides the logits, or None."""
    returns_scores: bool = False
    """Whether the block returns a pair, the second of which nobody reads."""
    experts: Callable[[PreTrainedConfig], dict[str, Any]] = activation_of
    """Options of `MoEConfig` about the experts, from the family's config."""
    router: Callable[[PreTrainedConfig], dict[str, Any]] = softmax_top_k
    """Options of `MoEConfig` that route as the family does."""
    ignored: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)
    """Patterns of keys of a checkpoint that transformers does not load either, beside those of
    layers behind the last one."""

    def sizes(self, config: PreTrainedConfig) -> dict[str, int]:
        """The sizes of `MoEConfig` that the family's config determines."""
        return {
            "hidden_size": config.hidden_size,
            "intermediate_size": getattr(config, self.intermediate_size),
            "num_experts": getattr(config, self.num_experts),
            "top_k": getattr(config, self.top_k),
        }

    @property
    def built_in(self) -> tuple[str, ...]:
        """Names of the config's attributes that are built into the layers."""
        sizes = ("hidden_size", self.num_experts, self.top_k, self.intermediate_size)
        return (*sizes, "hidden_act", *self.options)

    def coefficient(self, config: PreTrainedConfig) -> float | None:
        """Weight of the family's own balance loss; None where it has none."""
        return None if self.aux_coefficient is None else getattr(config, self.aux_coefficient)

    def aux_alpha(self, config: PreTrainedConfig) -> float:
        """`LossConfig.aux_alpha` that weighs the balance loss as the family does.

        The family's loss is top_k where this project's is 1, hence the factor.
        """
        return (self.coefficient(config) or 0.0) * getattr(config, self.top_k)

    def is_moe(self, layer: nn.Module) -> bool:
        """Whether a decoder layer of the family holds experts."""
        return hasattr(getattr(layer, self.block), "experts")


def expert_keys(prefix: str, gate: str, up: str, down: str, fused: str) -> tuple[Key, ...]:
    """Keys of experts that have three matrices each.

    Args:
        prefix: of the numbered experts on disk.
        gate, up, down: names of an expert's matrices.
        fused: prefix of the tensors of all experts in memory.
    """
    one = f"{prefix}.*"
    return (
        Key(
            ours="experts.gate_up_proj",
            theirs=(f"{one}.{gate}.weight", f"{one}.{up}.weight"),
            layout="experts",
            fused=f"{fused}.gate_up_proj",
        ),
        Key(
            ours="experts.down_proj",
            theirs=(f"{one}.{down}.weight",),
            layout="experts",
            fused=f"{fused}.down_proj",
        ),
    )


MLP_EXPERTS = expert_keys("mlp.experts", "gate_proj", "up_proj", "down_proj", "mlp.experts")
"""Experts of all families that follow Qwen2-MoE."""

MLP_ROUTER = Key(ours="router.weight", theirs=("mlp.gate.weight",))
"""Their router."""


def shared_keys(prefix: str) -> tuple[Key, ...]:
    """Keys of shared experts that lie side by side in one feed-forward."""
    return (
        Key(
            ours="shared_experts.gate_up_proj",
            theirs=(f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"),
            layout="one",
        ),
        Key(ours="shared_experts.down_proj", theirs=(f"{prefix}.down_proj.weight",), layout="one"),
    )
