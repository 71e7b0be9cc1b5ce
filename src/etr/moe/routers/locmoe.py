"""LocMoE: the predecessor of ETR, token choice by fixed GrAP affinity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.affinity import block_directions, block_width, grap_affinity
from etr.moe.context import RouterInput
from etr.moe.routers.base import Router, RouterConfig, RouterTraits, one_best
from etr.moe.routing import Scores
from etr.moe.score_scale import CosineScale


@dataclass(frozen=True, kw_only=True)
class LocMoERouter(RouterConfig):
    """Tokens choose one expert by GrAP affinity; overflow is dropped by position.

    arXiv 2401.13920. With its own capacity policy and, over several nodes, the locality loss.
    """

    name = "locmoe"
    paper = "2401.13920"
    summary = "preset: fixed GrAP top-1, dropped by position, frozen capacity, locality loss"

    temperature: float | None = None
    """Scale of the affinity before the softmax, no unit. None: sqrt(hidden_size)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be > 0, or None for sqrt(H)")

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            has_directions=True,
            has_cosine=True,
            rank_by=("position",),
            default_capacity="locmoe",
            padded=True,
            numbered=True,
        )

    def check(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        one_best(self.name, top_k)
        block_width(hidden_size, num_experts)

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _LocMoERouter(self, hidden_size, num_experts, top_k)


class _LocMoERouter(Router):
    config: LocMoERouter
    takes_any_dtype = True

    def __init__(
        self, config: LocMoERouter, hidden_size: int, num_experts: int, top_k: int
    ) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.score_scale = CosineScale(hidden_size)
        self.temperature = config.temperature or math.sqrt(hidden_size)

    def directions(self, dtype: torch.dtype) -> Tensor:
        return block_directions(self.hidden_size, self.num_experts, dtype)

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        affinity = grap_affinity(x, self.num_experts)
        logits = affinity * self.temperature
        probs = logits.softmax(-1)
        return Scores(scores=affinity, logits=logits, gates=probs, probs=probs)
