"""Hash layer: the token's vocabulary id alone decides."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from etr.moe.context import RouterInput
from etr.moe.routers.base import Router, RouterConfig, RouterTraits
from etr.moe.routers.hashing import distinct_experts, mix, unlearned_scores
from etr.moe.routing import Scores


@dataclass(frozen=True, kw_only=True)
class Hash(RouterConfig):
    """Experts by a fixed hash of (seed, layer, token id); weights 1 / top_k (arXiv 2106.04426)."""

    name = "hash"
    paper = "2106.04426"
    summary = "fixed hash of the token id; nothing learned"

    seed: int = 0
    """Chooses the hash function."""

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(has_scores=False, has_probs=False, rank_by=("position",), numbered=True)

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _HashRouter(self, hidden_size, num_experts, top_k)


class _HashRouter(Router):
    config: Hash

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        if inputs.token_ids is None:
            raise ValueError(
                "router 'hash' needs RoutingContext(token_ids=...), int64 of the input's shape "
                "without its last dimension"
            )
        key = mix(inputs.token_ids, self.config.seed * 7919 + inputs.layer_index * 104729)
        order = distinct_experts(key, self.top_k, self.num_experts)
        return unlearned_scores(x, order, self.top_k, self.num_experts)
