"""ReXMoE: neighbouring layers lend each other their experts, more of them as training goes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.moe.context import RouterInput
from etr.moe.experts import BANKS, Shared
from etr.moe.learner import Learner
from etr.moe.losses import LOSSES, PoolBalance
from etr.moe.routers import ROUTERS, Router, RouterConfig, RouterTraits
from etr.moe.routers.hashing import mix
from etr.moe.routers.linear import SoftmaxRouter
from etr.moe.routing import Scores

CLOSED = -1e30
"""Logit of an expert that a layer may not use yet; its probability is exactly 0."""


@dataclass(frozen=True, kw_only=True)
class Lending(RouterConfig):
    """Token choice among a layer's own experts and a growing number of its neighbours'.

    Each of `group` consecutive layers owns an equal block of the bank that they share.
    """

    name = "lending"
    paper = "2510.17483"
    summary = "learned linear router over the layer's own experts and ever more of its neighbours'"

    group: int = 1
    """Consecutive MoE layers that lend each other experts, as the bank's `layers`; 1: plain."""
    start: float = 0.1
    """Fraction of optimizer steps until which a layer has its own experts alone."""
    until: float = 0.3
    """Fraction of optimizer steps from which on it has all of the group's."""
    seed: int = 0
    """Of the order in which a layer gets the others' experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            raise ValueError(f"group={self.group} must be at least 1 layer")
        if not 0 <= self.start < self.until <= 1:
            raise ValueError(
                f"start={self.start} and until={self.until} must be fractions of training, "
                "0 <= start < until <= 1"
            )

    def check(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        own, rest = divmod(num_experts, self.group)
        if rest or top_k > own:
            raise ValueError(
                f"router 'lending': group={self.group} layers must own equal blocks of num_experts="
                f"{num_experts}, each of at least top_k={top_k}"
            )

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(default_capacity="none", rank_by=("position",), has_scores=False)

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _LendingRouter(self, hidden_size, num_experts, top_k)


class Widening(Learner):
    """How many experts a layer has, int64 [].

    Args:
        own: N, its own.
        whole: those of its group.
        start, until: fractions of optimizer steps between which their number grows.
    """

    count: Tensor

    def __init__(self, own: int, whole: int, start: float, until: float) -> None:
        super().__init__()
        self.own, self.whole, self.start, self.until = own, whole, start, until
        self.register_state("count", (), own, torch.int64)

    @property
    def moves(self) -> bool:
        return self.own < self.whole

    def set_progress(self, progress: float) -> None:
        share = (progress - self.start) / (self.until - self.start)
        self.count.fill_(self.own + round((self.whole - self.own) * min(max(share, 0.0), 1.0)))


class _LendingRouter(SoftmaxRouter):
    config: Lending

    def __init__(self, config: Lending, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        own = num_experts // config.group
        self.widening = Widening(own, num_experts, config.start, config.until)

    @property
    def num_open(self) -> Tensor:
        return self.widening.count

    def is_open(self, place: int) -> Tensor:
        """Which experts a layer has, bool [E]: its own, then others in an order of its own."""
        count = self.widening.count
        number = torch.arange(self.num_experts, device=count.device)
        place = place % self.config.group
        own = number // (self.num_experts // self.config.group) == place
        order = mix(number, self.config.seed * 1000003 + place * 104729 + 1)
        turn = torch.where(own, number - self.num_experts, order).argsort().argsort()
        return turn < count

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        logits = self.logits(x)
        logits = torch.where(self.is_open(inputs.place), logits, CLOSED)
        return self.of_logits(logits)

    def preferences(self, scores: Scores) -> Tensor:
        """Closed experts come after open ones of probability 0 too."""
        assert scores.logits is not None
        return torch.where(scores.logits.detach() > CLOSED / 2, scores.scores.detach(), -1.0)


CARD = Card(
    name="rexmoe",
    title="ReXMoE",
    summary="neighbouring layers share their experts, of which each has ever more in training",
    paper=Lending.paper,
    level="model",
    branch="expert design",
    rows=(
        Row(table=ROUTERS, kind=Lending),
        Row(table=BANKS, kind=Shared),
        Row(table=LOSSES, kind=PoolBalance),
    ),
    options={
        "router": "lending:group=2",
        "experts": "shared:layers=2",
        "losses": "pool_balance",
        "capacity": "none",
    },
    against="token_choice/num_experts=4/capacity=none",
    moves=("loss", "load"),
    claim=(
        "A group of 1 is token choice bit for bit; until lending starts a group of 2 computes what "
        "two plain layers with its blocks of experts and router rows do; experts that a layer does "
        "not have yet get weight 0 and no token, and of 8 it has 4, 5, 6, 7 and 8 as training "
        "goes. Four layers have as many parameters of experts in groups of 1, 2 and 4."
    ),
    departs=(
        "num_experts are those of the group, so a layer owns num_experts / group. The order in "
        "which others' experts come is by a fixed hash. The balance loss is that of the group; "
        "between start and until its least value can exceed 1. No gain of the loss was seen."
    ),
)
