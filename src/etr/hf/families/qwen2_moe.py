"""Qwen2-MoE: like Qwen3-MoE, and a shared expert behind a gate of its own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from etr.hf.families.base import (
    MLP_EXPERTS,
    MLP_ROUTER,
    Family,
    Key,
    activation_of,
    shared_keys,
)


def _experts(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        **activation_of(config),
        "num_shared_experts": 1,
        "shared_intermediate_size": config.shared_expert_intermediate_size,
        "shared_gate": True,
    }


FAMILY = Family(
    model_type="qwen2_moe",
    intermediate_size="moe_intermediate_size",
    experts=_experts,
    options=(
        "norm_topk_prob",
        "shared_expert_intermediate_size",
        "decoder_sparse_step",
        "mlp_only_layers",
    ),
    keys=(
        MLP_ROUTER,
        *MLP_EXPERTS,
        *shared_keys("mlp.shared_expert"),
        Key(ours="shared_gate.weight", theirs=("mlp.shared_expert_gate.weight",)),
    ),
)
