"""DeepSeekMoE: finer experts, some of which every token passes (arXiv 2401.06066)."""

from __future__ import annotations

import dataclasses

from etr.methods.card import Card, Row
from etr.moe.config import MoEConfig
from etr.moe.experts import BANKS, Uniform
from etr.moe.routers import ROUTERS, TokenChoice


def fine_grained(config: MoEConfig, segments: int, shared: int) -> MoEConfig:
    """The same expert parameters and FLOPs in more and narrower experts.

    Args:
        config: N experts of width I, of which a token takes K; without biases and shared experts.
        segments: m. The new layer has m N experts of width I / m.
        shared: how many of them every token passes, with weight 1. Of the others a token takes
            m K - shared, weighed by a softmax over these, which is not normalised again.
    Raises:
        ValueError: sizes do not fit.
    """
    if segments < 1 or config.intermediate_size % segments:
        raise ValueError(
            f"segments={segments} must be at least 1 and divide intermediate_size="
            f"{config.intermediate_size}"
        )
    if not 0 <= shared < segments * config.top_k:
        raise ValueError(
            f"shared={shared} must be at least 0 and below segments * top_k="
            f"{segments * config.top_k}, the experts that a token passes"
        )
    if config.num_shared_experts or config.expert_bias:
        raise ValueError(
            f"num_shared_experts={config.num_shared_experts} and expert_bias={config.expert_bias} "
            "must be 0 and False: neither can be cut finer"
        )
    return dataclasses.replace(
        config,
        num_experts=segments * config.num_experts - shared,
        top_k=segments * config.top_k - shared,
        intermediate_size=config.intermediate_size // segments,
        num_shared_experts=shared,
        normalize="none",
    )


CARD = Card(
    name="deepseek_moe",
    title="DeepSeekMoE",
    summary="m times finer experts of equal cost in all, some of which every token passes",
    paper="2401.06066",
    level="model",
    branch="expert design",
    rows=(Row(table=BANKS, kind=Uniform), Row(table=ROUTERS, kind=TokenChoice)),
    options={
        "router": "token_choice",
        "top_k": "2",
        "num_shared_experts": "1",
        "normalize": "none",
        "capacity": "none",
    },
    against="token_choice/num_experts=3/top_k=1/expert_size=768/capacity=none",
    moves=("loss", "load"),
    claim=(
        "Expert parameters (576) and those of a token (288) are equal for 1, 2 and 4 times finer "
        "experts and any number of shared ones; m = 1 without shared ones is the plain layer "
        "exactly, and slices of a feed-forward sum to it within 1e-4."
    ),
    departs=(
        "The shelf's row is 3 times finer with one shared expert (8 + 1 of width I for 3 of "
        "3 I); fine_grained(config, segments, shared) makes any other. Its loss balances experts, "
        "not devices."
    ),
)
