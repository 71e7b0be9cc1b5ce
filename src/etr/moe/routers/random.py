"""Random routing: the control that says what a router is worth."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from etr.moe.context import RouterInput
from etr.moe.routers.base import Router, RouterConfig, RouterTraits
from etr.moe.routers.hashing import distinct_experts, mix, unlearned_scores
from etr.moe.routing import Scores


@dataclass(frozen=True, kw_only=True)
class Random(RouterConfig):
    """Experts drawn from (seed, step, layer, global token index); weights 1 / top_k."""

    name = "random"
    paper = ""
    summary = "experts drawn at random for each token and step; a control"

    seed: int = 0
    """Chooses the stream of draws."""

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            has_scores=False,
            has_probs=False,
            rank_by=("position",),
            position_free=False,
            numbered=True,
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _RandomRouter(self, hidden_size, num_experts, top_k)


class _RandomRouter(Router):
    config: Random

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        salt = mix(inputs.step * 1000003 + self.config.seed * 7919, inputs.layer_index * 104729)
        assert inputs.token_index is not None  # the traits say that it is asked for
        order = distinct_experts(mix(inputs.token_index, salt), self.top_k, self.num_experts)
        return unlearned_scores(x, order, self.top_k, self.num_experts)
