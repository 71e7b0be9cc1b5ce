"""DeepSeek-V3: sigmoid scores, a bias on the choice, groups rated by their two best experts."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from etr.hf.families.base import MLP_EXPERTS, MLP_ROUTER, Family, Key, shared_keys
from etr.hf.families.deepseek_v2 import experts
from etr.moe.routers.token_choice import TokenChoice


def _router(config: PreTrainedConfig) -> dict[str, Any]:
    router = TokenChoice(
        gate="sigmoid",
        selection_bias=True,
        num_groups=config.n_group,
        top_groups=config.topk_group,
        group_score="best_two",
    )
    return {"router": router, "normalize": "chosen" if config.norm_topk_prob else "none"}


FAMILY = Family(
    model_type="deepseek_v3",
    num_experts="n_routed_experts",
    intermediate_size="moe_intermediate_size",
    aux_coefficient=None,
    experts=experts,
    router=_router,
    options=(
        "norm_topk_prob",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
        "n_shared_experts",
        "first_k_dense_replace",
    ),
    keys=(
        MLP_ROUTER,
        Key(ours="router.selection.bias", theirs=("mlp.gate.e_score_correction_bias",)),
        *MLP_EXPERTS,
        *shared_keys("mlp.shared_experts"),
    ),
)
