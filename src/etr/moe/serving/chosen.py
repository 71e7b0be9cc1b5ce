"""Serving in which a policy, and not the router alone, says which experts a token takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.affinity import without_autocast
from etr.moe.calibration import Calibration
from etr.moe.context import RouterInput
from etr.moe.routers import Router
from etr.moe.routing import Limit, Routing
from etr.moe.select import top_experts
from etr.moe.serving.base import LayerFacts, Serving


@dataclass(frozen=True, kw_only=True)
class Chosen(Serving):
    """Base of policies that choose by the router's preferences, and drop nothing."""

    def refuses(self, facts: LayerFacts) -> str | None:
        traits = facts.traits
        if not (traits.tokens_choose and traits.fixed_k and traits.has_scores and traits.has_probs):
            return "its tokens do not choose their k best experts by a score"
        return None

    def choices(self, table: Tensor, inputs: RouterInput, top_k: int) -> Tensor:
        """Experts of each token, best first, int64 [T, k]; ``num_experts`` for an unused place.

        Args:
            table: what tokens rank experts by, float [T, E]; minus infinity: never.
            inputs: everything that is not the hidden state.
            top_k: experts a token takes by itself.
        """
        raise NotImplementedError

    def route(
        self, router: Router, x: Tensor, inputs: RouterInput, learned: Calibration
    ) -> tuple[Routing, Limit]:
        if inputs.replay is not None:
            return router(x, inputs, tokens_choose=True), Limit()
        with without_autocast(x):
            scores = router.scored(x, inputs)
            expert = self.choices(router.preferences(scores), inputs, router.top_k)
            return router.routing_of(scores, expert, inputs), Limit()


@dataclass(frozen=True, kw_only=True)
class Together(Chosen):
    """Base of policies by which tokens of a block vote for a few experts and choose among them.

    A block is what the context's `block` says, else so many consecutive tokens of a call: of a
    prompt, or of the requests that are decoded side by side. A token alone in its block takes its k
    best.
    """

    causal = False

    block: int = 32
    """Tokens of a block, where the call does not name one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise ValueError(f"block={self.block} must be at least 1, tokens")

    def core(self, votes: Tensor, top_k: int) -> Tensor:
        """Which experts a block may use, bool [B, E].

        Args:
            votes: of each block for each expert, float64 [B, E], at least 0.
            top_k: experts of a token, at least so many of which must be there.
        """
        raise NotImplementedError

    def choices(self, table: Tensor, inputs: RouterInput, top_k: int) -> Tensor:
        num_tokens, num_experts = table.shape
        block = torch.arange(num_tokens, device=table.device) // self.block
        if inputs.block is not None:
            block = torch.unique(inputs.block, return_inverse=True)[1]
        best = top_experts(table, top_k)
        # In float64, so that sums of many do not depend on the device's order.
        value = table.gather(1, best).double().clamp_min(0)
        value = value.masked_fill(~inputs.valid_mask[:, None], 0.0)
        votes = value.new_zeros(int(block.max()) + 1 if num_tokens else 0, num_experts)
        votes.index_put_((block[:, None].expand_as(best), best), value, accumulate=True)
        inside = self.core(votes, top_k)[block]
        best = top_experts(table.masked_fill(~inside, -torch.inf), top_k)
        return best.masked_fill(~inside.gather(1, best), num_experts)


def best_of(votes: Tensor, number: Tensor | int) -> Tensor:
    """The experts with the most votes of each block, bool [B, E]; equal votes: the lower ones.

    Args:
        number: how many, for all blocks or for each, int64 [B, 1].
    """
    order = votes.sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(votes.shape[1], device=votes.device).expand_as(votes)
    return torch.zeros_like(votes, dtype=torch.bool).scatter(1, order, place < number)
