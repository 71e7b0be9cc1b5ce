"""SCMoE: a model's logits, pushed away from those of an expert it ranks lower (2405.14507)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.model.decoding import DECODINGS, Decoding
from etr.moe.calibration import Calibration
from etr.moe.checked import check_types
from etr.moe.context import RouterInput
from etr.moe.routers import Router
from etr.moe.routing import Limit, Routing
from etr.moe.select import top_experts
from etr.moe.serving import SERVING
from etr.moe.serving.chosen import Chosen


@dataclass(frozen=True, kw_only=True)
class Ranks(Chosen):
    """Experts by their place in a token's order, also below its k best; one alone has weight 1."""

    name = "ranks"
    summary = "the experts of some places in each token's order"

    first: int = 0
    """Place of the best of them, from 0."""
    count: int = 1
    """How many; fewer where there are no more experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("first", 0), ("count", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    def choices(self, table: Tensor, inputs: RouterInput, top_k: int) -> Tensor:
        # The last experts where there are not so many: a token has one at least.
        first = min(self.first, table.shape[1] - 1)
        return top_experts(table, min(first + self.count, table.shape[1]))[:, first:]

    def route(
        self, router: Router, x: Tensor, inputs: RouterInput, learned: Calibration
    ) -> tuple[Routing, Limit]:
        routing, limit = super().route(router, x, inputs, learned)
        if self.count > 1 or inputs.replay is not None:
            return routing, limit
        return replace(routing, gate=torch.ones_like(routing.gate)), limit


@dataclass(frozen=True, kw_only=True)
class SelfContrast(Decoding):
    """``(1 + beta) strong - beta weak`` over tokens that the strong logits find likely.

    Strong is the model as it is set; weak runs the expert of one place alone, with weight 1.
    """

    name = "scmoe"
    summary = "the model's logits, pushed away from those of an expert it ranks lower"

    beta: float = 0.5
    """How far; 0 takes the model's own best token."""
    alpha: float = 0.1
    """Least probability of a token, of that of the likeliest one."""
    rank: int = 2
    """Place of the weak pass's expert, from 1."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.beta >= 0:
            raise ValueError(f"beta={self.beta} must be >= 0")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie in (0, 1]")
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")

    @property
    def branches(self) -> tuple[str | None, ...]:
        return (None, f"ranks:first={self.rank - 1}")

    def combine(self, logits: Sequence[Tensor]) -> Tensor:
        strong, weak = logits
        unlikely = strong < strong.amax(-1, keepdim=True) + math.log(self.alpha)
        found = (1 + self.beta) * strong - self.beta * weak
        return found.masked_fill(unlikely, -torch.inf)


CARD = Card(
    name="scmoe",
    title="SCMoE",
    summary=SelfContrast.summary,
    paper="2405.14507",
    level="model",
    branch="decoding",
    rows=(Row(table=DECODINGS, kind=SelfContrast), Row(table=SERVING, kind=Ranks)),
    against="plain",
    moves=("loss", "FLOPs"),
    claim=(
        "beta = 0 chooses the token that greedy decoding chooses; ranks 1 to k are the model's own "
        "routing bit for bit; strong logits 2, 1.8, 0, -2 and weak ones 2.2, .5, 1, -3 give 1.9, "
        "2.45, -.5 and none, so token 1 and not 0 (alpha = 0.1, beta = 0.5)."
    ),
    departs=(
        "The paper searches beta for each task; no gain is claimed here. Which tokens are likely "
        "is seen before a temperature, and the end of the text is a token like others."
    ),
)
