"""GPT-OSS: biases everywhere, a clamped activation, gate and up in turns in one tensor."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from etr.hf.families.base import Family, Key
from etr.moe.routers.token_choice import TokenChoice


def _experts(config: PreTrainedConfig) -> dict[str, Any]:
    # Constants of the model, not options of its config, in older versions of transformers.
    return {
        "activation": "clamped_swiglu",
        "swiglu_limit": getattr(config, "swiglu_limit", 7.0),
        "swiglu_alpha": getattr(config, "swiglu_alpha", 1.702),
        "expert_bias": True,
    }


def _router(config: PreTrainedConfig) -> dict[str, Any]:
    # A softmax over the chosen logits is the softmax over all, normalised over the chosen.
    return {"router": TokenChoice(bias=True), "normalize": "chosen"}


FAMILY = Family(
    model_type="gpt_oss",
    router_name="router",
    num_experts="num_local_experts",
    returns_scores=True,
    experts=_experts,
    router=_router,
    options=("swiglu_limit", "swiglu_alpha"),
    keys=(
        Key(ours="router.weight", theirs=("mlp.router.weight",)),
        Key(ours="router.bias", theirs=("mlp.router.bias",)),
        Key(
            ours="experts.gate_up_proj",
            theirs=("mlp.experts.gate_up_proj",),
            layout="transposed_pairs",
        ),
        Key(
            ours="experts.gate_up_proj_bias",
            theirs=("mlp.experts.gate_up_proj_bias",),
            layout="pairs",
        ),
        Key(ours="experts.down_proj", theirs=("mlp.experts.down_proj",), layout="transposed"),
        Key(ours="experts.down_proj_bias", theirs=("mlp.experts.down_proj_bias",)),
    ),
)
