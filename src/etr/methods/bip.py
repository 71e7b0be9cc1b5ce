"""Balance by integer programming: dual prices of experts, from the batch's scores (2502.15451)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.moe.context import RouterInput
from etr.moe.learner import Learner, Seen, Step
from etr.moe.routers import ROUTERS, Router, RouterConfig, RouterTraits
from etr.moe.routers.linear import SoftmaxRouter
from etr.moe.routing import Routing, Scores
from etr.moe.select import top_experts


@dataclass(frozen=True, kw_only=True)
class Bip(RouterConfig):
    """Each token takes the experts of highest score less price; prices even out the load.

    arXiv 2502.15451. Prices solve the dual of the assignment in which scores are greatest and
    loads even, by a few steps on the scores of a batch, and live on from step to step.
    """

    name = "bip"
    paper = "2502.15451"
    summary = "learned linear router, prices of experts even out the batch's load"

    steps: int = 4
    """Dual steps on each batch."""
    clamp: bool = False
    """Keep margins and prices from falling below 0, as published. False: the mean price is 0."""
    sees: Literal["batch", "before"] = "batch"
    """Whose prices choose. batch: those that the batch itself leads to, so that later tokens change
    earlier ones. before: those of the step before, which is causal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1 dual step")

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            causal=self.sees == "before",
            rank_by=("position", "score"),
            default_capacity="none",
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _BipRouter(self, hidden_size, num_experts, top_k)


def dual_steps(
    scores: Tensor, valid: Tensor, price: Tensor, top_k: int, steps: int, clamp: bool
) -> Tensor:
    """Prices that make the load of a batch even.

    Args:
        scores: float [T, E].
        valid: True for real tokens, bool [T].
        price: where to start, float [E].
        top_k: experts a token takes.
        steps: of each, the margin of every token and the price of every expert.
        clamp: keep both from falling below 0; else the mean price is 0.
    Returns:
        float [E]; `price` itself where there is nothing to choose.
    """
    num_tokens, num_experts = scores.shape
    if top_k == num_experts or not num_tokens:
        return price
    count = valid.sum()
    room = (count * top_k // num_experts)[None]  # below T, since k < E
    found = price
    for _ in range(steps):
        margin = (scores - found).topk(top_k + 1, dim=-1).values[:, -1:]
        margin = margin.clamp_min(0) if clamp else margin
        column = (scores - margin).masked_fill(~valid[:, None], -torch.inf)
        found = column.sort(dim=0, descending=True).values.index_select(0, room)[0]
        found = found.clamp_min(0) if clamp else found - found.mean()
    return torch.where(count > 0, found, price)


class Prices(Learner):
    """Prices that the last optimizer step led to, float32 [E]: the mean over its tokens' batches.

    Args:
        num_experts: E.
    """

    price: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_state("price", (num_experts,), 0.0)

    def observe(self, seen: Seen) -> dict[str, Tensor]:
        return dict(seen.routing.counters)

    def after_step(self, step: Step) -> None:
        if "prices" in step.counters:  # not where choices were replayed
            count = step.counters["num_valid_tokens"]
            mean = step.counters["prices"] / count.clamp_min(1)
            self.price.copy_(torch.where(count > 0, mean, self.price))


class _BipRouter(SoftmaxRouter):
    config: Bip

    def __init__(self, config: Bip, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.prices = Prices(num_experts)

    def preferences(self, scores: Scores) -> Tensor:
        return _less(super().preferences(scores), self.prices.price)

    def choose(self, scores: Scores, inputs: RouterInput) -> Routing:
        price = self._price_of_batch(scores.scores.detach(), inputs)
        if self.config.sees == "before":
            routing = self.choose_alone(scores, inputs)
        else:
            table = _less(scores.scores.detach(), price)
            table = table if inputs.bonus is None else table + inputs.bonus
            routing = self.routing_of(scores, top_experts(table, self.top_k), inputs)
        weight = inputs.valid_mask.sum()  # this rank's part in the mean
        return replace(routing, counters={"prices": price.double() * weight})

    def _price_of_batch(self, scores: Tensor, inputs: RouterInput) -> Tensor:
        """Prices after the dual steps on the tokens of all ranks."""
        scores, valid = inputs.of_all_ranks(scores)
        price = self.prices.price.to(scores.dtype)
        return dual_steps(scores, valid, price, self.top_k, self.config.steps, self.config.clamp)


def _less(scores: Tensor, price: Tensor) -> Tensor:
    """Scores less prices, [T, E], to a millionth.

    Where prices have settled, the token that sets an expert's price gains as much elsewhere: which
    of the two it takes must not hang on rounding.
    """
    return ((scores - price.to(scores.dtype)) * 2**20).round() / 2**20


CARD = Card(
    name="bip",
    title="Balance by integer programming (BIP)",
    summary="prices of experts, by dual steps on a batch's scores, even out its load; no loss",
    paper="2502.15451",
    level="model",
    branch="training",
    rows=(Row(table=ROUTERS, kind=Bip),),
    options={"router": "bip", "capacity": "none", "aux_alpha": "0"},
    moves=("loss", "load"),
    claim=(
        "Where one of 8 experts is the favourite of all tokens (MaxVio > 2), 4 dual steps bring "
        "MaxVio to 0.1 or less in every batch, while weights stay those of the scores; served, "
        "and with prices of the step before, no later token changes an earlier one's experts."
    ),
    departs=(
        "Margins and prices may be negative, and the mean price is 0; clamp=true keeps both from "
        "falling below 0, as published. Prices live on from optimizer step to optimizer step, as "
        "the mean over its micro-batches."
    ),
)
