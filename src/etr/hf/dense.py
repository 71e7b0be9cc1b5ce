"""Dense families of models that can be upcycled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense family, and the MoE family that has the same attention."""

    moe: type[PreTrainedConfig]
    """Config of the MoE family."""
    width: str
    """Its attribute for the width inside each expert."""
    num_experts: str
    """Its attribute for the number of experts."""
    fixed: dict[str, Any]
    """Further attributes of it."""
    must_be_off: tuple[str, ...] = ()
    """Attributes of the dense config that the MoE family does not have."""


_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}
DENSE: dict[str, Dense] = {
    "llama": Dense(
        moe=MixtralConfig,
        width="intermediate_size",
        num_experts="num_local_experts",
        fixed={"sliding_window": None},
        must_be_off=("attention_bias", "mlp_bias"),
    ),
    "mistral": Dense(
        moe=MixtralConfig, width="intermediate_size", num_experts="num_local_experts", fixed={}
    ),
    "qwen2": Dense(
        moe=Qwen2MoeConfig,
        width="moe_intermediate_size",
        num_experts="num_experts",
        fixed={**_EVERY_LAYER, "qkv_bias": True},
        must_be_off=("use_sliding_window",),
    ),
    "qwen3": Dense(
        moe=Qwen3MoeConfig,
        width="moe_intermediate_size",
        num_experts="num_experts",
        fixed=_EVERY_LAYER,
        must_be_off=("use_sliding_window",),
    ),
}
"""Dense families by model type."""
