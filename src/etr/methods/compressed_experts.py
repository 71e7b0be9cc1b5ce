"""Compressed Experts: a token's later choices become vectors that scale the first (2503.00634)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors, LazyTensor
from etr.model.experts import OfExperts, lists_of
from etr.moe.config import MoEConfig
from etr.moe.experts.compressed import Compressed


@dataclass(frozen=True, kw_only=True)
class CompressExperts(OfExperts):
    """Runs the first of a token's choices alone; the others scale them by vectors, 1 at first.

    The vectors are to be trained, alone (``experts.vectors``) or with the rest.
    """

    name = "compressed_experts"
    summary = "run a token's first choices alone; its others scale these by vectors, to be trained"

    main: int = 1
    """Choices that run. As many as a token has: the model stays as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.main < 1:
            raise ValueError(f"main={self.main} must be at least 1 choice")
        if self.protect:
            raise ValueError(f"protect={self.protect!r}: choices are compressed, not experts")

    def changes_function(self) -> str | None:
        return f"a token runs main={self.main} of its choices"

    def plan(self, stats: Sequence[Any], layers: Sequence[MoEConfig]) -> Any:
        return {"main": self.main, "of": [layer.top_k for layer in layers]}

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        words = ", ".join(dict.fromkeys(str(of) for of in plan["of"]))
        return f"runs {plan['main']} of a token's {words} choices"

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        of = lists_of(plan, "of", layers)
        if type(plan.get("main")) is not int or plan["main"] < 1:
            raise ValueError(f"the plan's main={plan.get('main')!r} must be at least 1 choice")
        for place, layer in enumerate(layers):
            router = layer.router_config
            if not (router.traits.fixed_k and router.traits.tokens_choose):
                raise ValueError(
                    f"router {router.name!r} of layer {place}: tokens must choose as many experts "
                    "each, so that the first can be told"
                )
            if layer.expert_bias:
                raise ValueError("expert_bias=True: experts with biases are not taken")
            if not plan["main"] <= layer.top_k == of[place]:
                raise ValueError(
                    f"main={plan['main']} of {of[place]} choices; tokens of layer {place} "
                    f"choose top_k={layer.top_k}"
                )

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        if plan["main"] == plan["of"][place]:
            return tensors
        num_experts, hidden_size, width = tensors["experts.down_proj"].shape
        shape, dtype = (num_experts, 2 * hidden_size + width), tensors["experts.down_proj"].dtype
        vectors = LazyTensor(
            name="experts.vectors",
            shape=shape,
            dtype=dtype,
            make=lambda: torch.ones(shape, dtype=dtype),
        )
        return {**tensors, "experts.vectors": vectors}

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        if plan["main"] == plan["of"][place]:
            return layer
        return replace(layer, experts=Compressed(main=plan["main"], of=plan["of"][place]))


CARD = Card(
    name="compressed_experts",
    title="Compressed Experts",
    summary="a token's first choices run; the others are vectors that scale them, to be trained",
    paper="2503.00634",
    level="model",
    branch="distillation",
    rows=(Row(table=TRANSFORMS, kind=CompressExperts),),
    moves=("loss", "FLOPs"),
    claim=(
        "Of a small language model whose tokens choose 4 experts 2 run, and training the vectors "
        "alone for 120 steps recovers more of the loss between 2 experts and 4 than one set of "
        "vectors for all experts does."
    ),
    departs=(
        "What is inside an expert has a vector of its own width, not a part of one as wide as a "
        "token. Where no other choice was kept the vectors are 1. The first choices keep the "
        "weights that they have among all. What is recovered is 0.33 here (one model; 0.19 by one "
        "set of vectors), where at least 0.35 was looked for."
    ),
)
