"""ExpertCondenser: drive rare experts to silence, and keep some always on (arXiv 2604.23036)."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
class Condenser(RouterConfig):
    """Token choice by logits with a bias that grows where experts are used, and some always on.

    The bias is in selection and weights. Condensers, the last experts, run for every token
    beside its own choices, weighed by their probability.
    """

    name = "expert_condenser"
    paper = "2604.23036"
    summary = "learned linear router, a bias towards used experts, and some experts always on"

    rate: float = 1e-4
    """Step of the bias: up where an expert has more than the mean probability, else down."""
    condensers: int = 2
    """Experts, the last ones, that run for every token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate < math.inf:
            raise ValueError(f"rate={self.rate} must be >= 0 and finite")
        if self.condensers < 0:
            raise ValueError(f"condensers={self.condensers} must be at least 0 experts")

    def check(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        if self.condensers > num_experts:
            raise ValueError(f"condensers={self.condensers} exceeds num_experts={num_experts}")

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            fixed_k=self.condensers == 0,
            has_scores=False,
            numbered=self.condensers > 0,
            rank_by=("position",),
            default_capacity="none",
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _CondenserRouter(self, hidden_size, num_experts, top_k)


class UsageBias(Learner):
    """What is added to the logits, float32 [E].

    Args:
        num_experts: E.
        rate: of one optimizer step.
    """

    bias: Tensor

    def __init__(self, num_experts: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_state("bias", (num_experts,), 0.0)

    @property
    def moves(self) -> bool:
        return self.rate > 0

    def observe(self, seen: Seen) -> dict[str, Tensor]:
        assert seen.routing.probs is not None
        probs = seen.routing.probs.detach().double()
        return {"usage": torch.where(seen.routing.valid_mask[:, None], probs, 0.0).sum(0)}

    def after_step(self, step: Step) -> None:
        usage = step.counters["usage"]
        self.bias.copy_(self.bias + self.rate * (usage - usage.mean()).sign())


class _CondenserRouter(SoftmaxRouter):
    config: Condenser

    def __init__(self, config: Condenser, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.usage = UsageBias(num_experts, config.rate)

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        return self.of_logits(self.logits(x) + self.usage.bias.to(x.dtype))

    def choose_alone(self, scores: Scores, inputs: RouterInput) -> Routing:
        best = top_experts(self.preferences(scores), self.top_k)
        first = self.num_experts - self.config.condensers
        always = torch.arange(first, self.num_experts, device=best.device)
        always = always.expand(best.shape[0], -1)
        again = (best[:, :, None] == always[:, None]).any(1)  # one that was chosen runs once
        always = always.masked_fill(again, self.num_experts)
        return self.routing_of(scores, torch.cat((best, always), dim=1), inputs)


CARD = Card(
    name="expert_condenser",
    title="ExpertCondenser",
    summary="a bias drives rare experts to silence, while some experts always run",
    paper=Condenser.paper,
    level="model",
    branch="training",
    rows=(Row(table=ROUTERS, kind=Condenser),),
    options={"router": "expert_condenser", "losses": ""},
    against="token_choice/top_k=2/capacity=none",
    moves=("loss", "load", "experts per token", "FLOPs"),
    claim=(
        "Of 16 experts that all have over 1 % of the tokens, 10 or fewer do after 100 steps of "
        "0.02, and all 16 without steps; condensers have a gradient in every step."
    ),
    departs=(
        "Condensers are the last experts, not those of lowest bias after an earlier phase. One "
        "that a token chose itself runs and weighs once, not twice. Usage is summed over all ranks "
        "and micro-batches. The bias drifts for as long as training goes."
    ),
)
