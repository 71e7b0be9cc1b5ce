"""ReMoE: ReLU gates, and a loss on them that holds their number (arXiv 2412.14711)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.moe.context import RouterInput
from etr.moe.learner import Learner, Seen, Step
from etr.moe.losses import LOSSES, Loss, LossInput
from etr.moe.losses.means import mean_over_valid, sum_over_group
from etr.moe.routers import ROUTERS, Router, RouterConfig, RouterTraits
from etr.moe.routers.linear import LinearRouter
from etr.moe.routing import Routing, Scores
from etr.moe.select import top_experts


@dataclass(frozen=True, kw_only=True)
class ReMoE(RouterConfig):
    """An expert runs where its logit is above 0, and the logit weighs it; `top_k` on average.

    The loss `open_gates` closes gates. Its weight is multiplied by a pressure that all layers
    share: it grows while tokens take more than `top_k` experts, and shrinks while they take fewer.
    """

    name = "remoe"
    paper = "2412.14711"
    summary = "ReLU gates: as many experts as have one above 0, on average top_k"

    rate: float = 1.2
    """Factor by which the pressure on gates grows or shrinks after each optimizer step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rate > 1:
            raise ValueError(f"rate={self.rate} must be > 1")

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            fixed_k=False,
            normalize="none",
            sparse_gates=True,
            has_scores=False,
            has_probs=False,
            rank_by=("position",),
            default_capacity="none",
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _ReMoERouter(self, hidden_size, num_experts, top_k)


class Pressure(Learner):
    """What the weight of a loss on gates is multiplied by, float32 [], at least 1.

    Args:
        top_k: experts that a token should take on average.
        rate: factor of one step.
    """

    factor: Tensor

    def __init__(self, top_k: int, rate: float) -> None:
        super().__init__()
        self.top_k, self.rate = top_k, rate
        self.register_state("factor", (), 1.0)

    def observe(self, seen: Seen) -> dict[str, Tensor]:
        asked = seen.kept.num_choices_per_expert.sum()
        wanted = self.top_k * seen.routing.num_valid_tokens()
        return {"num_excess_gates": asked - wanted}

    def after_step(self, step: Step) -> None:
        excess = torch.stack(
            [s["num_excess_gates"] for s in step.layers if "num_excess_gates" in s]
        )
        # Without a floor the factor falls on while gates cannot open, and comes back far too late.
        factor = self.factor.double() * self.rate ** excess.sum().sign()
        self.factor.copy_(factor.clamp_min(1.0))


class _ReMoERouter(LinearRouter):
    config: ReMoE

    def __init__(self, config: ReMoE, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.pressure = Pressure(top_k, config.rate)

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        logits = self.logits(x)
        return Scores(scores=logits, logits=logits, gates=logits.relu(), probs=None)

    def choose_alone(self, scores: Scores, inputs: RouterInput) -> Routing:
        order = top_experts(self.preferences(scores), self.num_experts)
        runs = scores.scores.detach().gather(1, order) > 0
        return self.routing_of(scores, torch.where(runs, order, self.num_experts), inputs)


@dataclass(frozen=True, kw_only=True)
class OpenGates(Loss):
    """Mean over tokens of the sum of their gates, each by its expert's load; times the pressure."""

    name = "open_gates"
    own = 1e-8
    needs = ("sparse_gates",)

    balanced: bool = True
    """A gate counts by its expert's share of the tokens, 1 where that is top_k / E; else by 1."""

    @property
    def is_mean(self) -> bool:
        return not self.balanced

    def __call__(self, given: LossInput) -> Tensor:
        routing, group = given.routing, given.context.data_group
        share = torch.ones_like(given.choices)
        if self.balanced:
            even = routing.top_k * sum_over_group(routing.num_valid_tokens(), group)
            share = routing.num_experts * given.load("ranks") / even.clamp_min(1)
        gate = torch.where(routing.valid, routing.gate, 0.0)
        weight = share.to(gate.dtype)[routing.expert.clamp_max(routing.num_experts - 1)]
        sums = gate.new_zeros(routing.num_tokens).index_add(0, routing.token, gate * weight)
        assert isinstance(given.router, _ReMoERouter)
        return given.router.pressure.factor.to(gate) * mean_over_valid(sums, routing, group)


CARD = Card(
    name="remoe",
    title="ReMoE",
    summary="ReLU gates, and a loss on them whose weight holds top_k experts a token on average",
    paper=ReMoE.paper,
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=ReMoE), Row(table=LOSSES, kind=OpenGates)),
    options={"router": "remoe", "losses": "open_gates"},
    against="token_choice/top_k=2/capacity=none",
    moves=("loss", "load", "experts per token", "FLOPs"),
    claim=(
        "On clustered tokens, top_k = 2 of 8, half of the experts run at first; then their number "
        "falls to 2 within 115 steps, and over the last 300 of 1000 steps its mean is 2 +- 0.05."
    ),
    departs=(
        "The pressure does not fall below where it starts: the published rule cannot open gates, "
        "and goes on falling without bound. Gates of an expert that no token opens get no gradient."
    ),
)
