"""DeepSeek-V2: shared experts, weights scaled and not normalised, perhaps groups of experts."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from etr.hf.families.base import MLP_EXPERTS, MLP_ROUTER, Family, activation_of, shared_keys
from etr.moe.routers.token_choice import TokenChoice

METHODS = ("greedy", "group_limited_greedy")


def experts(config: PreTrainedConfig) -> dict[str, Any]:
    """Options of the experts; also DeepSeek-V3's."""
    if getattr(config, "mlp_bias", False):
        raise ValueError("mlp_bias=True of the base config: shared experts have no biases here")
    return {
        **activation_of(config),
        "routed_scale": config.routed_scaling_factor,
        "num_shared_experts": config.n_shared_experts,
    }


def _router(config: PreTrainedConfig) -> dict[str, Any]:
    if config.topk_method not in METHODS:
        raise ValueError(
            f"topk_method={config.topk_method!r} of the base config is unknown; known: "
            f"{', '.join(METHODS)}"
        )
    groups = {}
    if config.topk_method == "group_limited_greedy":
        groups = {"num_groups": config.n_group, "top_groups": config.topk_group}
    return {"router": TokenChoice(**groups), "normalize": "none"}


FAMILY = Family(
    model_type="deepseek_v2",
    num_experts="n_routed_experts",
    intermediate_size="moe_intermediate_size",
    aux_coefficient=None,
    experts=experts,
    router=_router,
    options=(
        "topk_method",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "n_shared_experts",
        "first_k_dense_replace",
        "mlp_bias",
    ),
    keys=(MLP_ROUTER, *MLP_EXPERTS, *shared_keys("mlp.shared_experts")),
)
