"""Expert choice: every expert takes its best tokens from the whole batch."""

from __future__ import annotations

from dataclasses import dataclass

from etr.moe.context import RouterInput
from etr.moe.routers.base import Router, RouterConfig, RouterTraits
from etr.moe.routers.linear import SoftmaxRouter
from etr.moe.routing import Routing, Scores


@dataclass(frozen=True, kw_only=True)
class ExpertChoice(RouterConfig):
    """Experts take the tokens of highest softmax score, perfectly balanced and not causal.

    arXiv 2202.09368. Evaluation uses thresholds, or each token's top_k experts where dropless.
    """

    name = "expert_choice"
    paper = "2202.09368"
    summary = "learned linear router, each expert takes its best tokens"

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            has_directions=True,
            causal=False,
            fixed_load=True,
            tokens_choose=False,
            rank_by=("score",),
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _ExpertChoiceRouter(self, hidden_size, num_experts, top_k)


class _ExpertChoiceRouter(SoftmaxRouter):
    def choose(self, scores: Scores, inputs: RouterInput) -> Routing:
        return self.all_pairs(scores, inputs)
