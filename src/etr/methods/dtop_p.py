"""DTop-p: a probability that tokens' experts must hold, steered to a number (arXiv 2512.13996)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etr.methods.card import Card, Row
from etr.moe.context import RouterInput
from etr.moe.learner import Learner, Seen, Step
from etr.moe.routers import ROUTERS, Router, RouterConfig, RouterTraits
from etr.moe.routers.linear import LinearRouter
from etr.moe.routing import Routing, Scores
from etr.moe.select import top_experts, until_mass

LOW, HIGH = 0.01, 0.99
"""Bounds of p."""
FLOOR = 1e-12
"""Added to the variance of a token's logits, which is 0 where all are alike."""


@dataclass(frozen=True, kw_only=True)
class DTopP(RouterConfig):
    """Each token takes its most probable experts until they hold p, `top_k` of them on average.

    A controller moves p after each optimizer step. Logits are brought to mean 0 and deviation 1
    over a token's experts, times a learned scale, so that one p suits all layers.
    """

    name = "dtop_p"
    paper = "2512.13996"
    summary = "experts until their probability is p, which a controller moves to top_k a token"

    start: float = 0.5
    """p at first, and without any error."""
    proportional: float = 0.2
    """Gain of the last error, (top_k - experts a token) / E."""
    integral: float = 0.05
    """Gain of the errors' sum."""
    per_layer: bool = False
    """Each layer has a p of its own; else one looks at the mean over the model's layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start <= 1:
            raise ValueError(f"start={self.start} must be a probability")
        for name in ("proportional", "integral"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            fixed_k=False,
            normalize="chosen",
            has_scores=False,
            rank_by=("position",),
            default_capacity="none",
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _DTopPRouter(self, hidden_size, num_experts, top_k)


class Controller(Learner):
    """The probability p, and the sum of its errors, float32 [].

    Args:
        config: gains and start.
        num_experts: E.
        target: experts that a token should take on average.
    """

    p: Tensor
    total: Tensor

    def __init__(self, config: DTopP, num_experts: int, target: int) -> None:
        super().__init__()
        self.config, self.num_experts, self.target = config, num_experts, target
        self.register_state("p", (), config.start)
        self.register_state("total", (), 0.0)

    def observe(self, seen: Seen) -> dict[str, Tensor]:
        taken = seen.kept.num_choices_per_expert.sum()
        return {"num_taken_and_takers": torch.stack((taken, seen.routing.num_valid_tokens()))}

    def after_step(self, step: Step) -> None:
        key, config = "num_taken_and_takers", self.config
        layers = [step.counters] if config.per_layer else step.layers
        counts = torch.stack([found[key] for found in layers if key in found])
        taken, takers = counts.sum(0).double()
        error = (self.target - taken / takers.clamp_min(1)) / self.num_experts
        error = torch.where(takers > 0, error, 0.0)
        total = self.total + error
        p = config.start + config.proportional * error + config.integral * total
        # What p cannot follow is not summed up, or p would stay at its bound long after.
        stuck = ((p <= LOW) & (error <= 0)) | ((p >= HIGH) & (error >= 0))
        self.total.copy_(torch.where(stuck, self.total, total))
        self.p.copy_(torch.where(takers > 0, p.clamp(LOW, HIGH), self.p))


class _DTopPRouter(LinearRouter):
    config: DTopP

    def __init__(self, config: DTopP, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.scale = nn.Parameter(torch.ones(1))
        self.controller = Controller(config, num_experts, top_k)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.scale)

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        raw = self.logits(x)
        apart = raw - raw.mean(-1, keepdim=True)
        spread = apart.square().mean(-1, keepdim=True) + FLOOR
        logits = self.scale.to(x.dtype) * apart / spread.sqrt()
        probs = logits.softmax(-1)
        return Scores(scores=probs, logits=logits, gates=probs, probs=probs)

    def choose_alone(self, scores: Scores, inputs: RouterInput) -> Routing:
        table = self.preferences(scores)
        order = top_experts(table, self.num_experts)
        takes = until_mass(table.gather(1, order), self.controller.p.double())
        return self.taking(scores, order, takes, inputs)


CARD = Card(
    name="dtop_p",
    title="DTop-p",
    summary="experts until they hold a probability that all layers share, steered to top_k a token",
    paper=DTopP.paper,
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=DTopP),),
    options={"router": "dtop_p", "losses": "balance:weight=1e-4"},
    against="token_choice/top_k=2/capacity=none",
    moves=("loss", "experts per token", "FLOPs"),
    claim=(
        "In two layers of 8 experts, from p = 0.5 and from 0.95, tokens take 2 +- 0.06 experts on "
        "average over the last 200 of 600 steps, where a fixed p = 0.5 gives fewer than 1.5."
    ),
    departs=(
        "Gains, the start and bounds of p, and that it stops summing at a bound, are this "
        "library's; so is that a token's own logits are normalised. There is no sharpness loss."
    ),
)
