"""Dynamic top-p: a token takes experts until their probability reaches p (arXiv 2403.07652)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from etr.methods.card import Card, Row
from etr.moe.context import RouterInput
from etr.moe.losses import LOSSES, Loss, LossInput, mean_over_valid
from etr.moe.routers import ROUTERS, Router, RouterConfig, RouterTraits
from etr.moe.routers.linear import SoftmaxRouter
from etr.moe.routing import Routing, Scores
from etr.moe.select import top_experts, until_mass


@dataclass(frozen=True, kw_only=True)
class TopP(RouterConfig):
    """Each token takes the smallest set of experts whose probabilities sum to p.

    arXiv 2403.07652. `top_k` is what capacities and reports expect of a token, not what it takes.
    """

    name = "dynamic_top_p"
    paper = "2403.07652"
    summary = "learned linear router, as many experts as a probability of p needs"

    p: float = 0.4
    """Probability that a token's experts must hold; 0 takes one expert, from 1 on all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.p < math.inf:
            raise ValueError(f"p={self.p} must be a probability, or above 1 for all experts")

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(fixed_k=False, rank_by=("position", "score"), default_capacity="none")

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _TopPRouter(self, hidden_size, num_experts, top_k)


class _TopPRouter(SoftmaxRouter):
    config: TopP

    def choose_alone(self, scores: Scores, inputs: RouterInput) -> Routing:
        table = self.preferences(scores)
        order = top_experts(table if inputs.bonus is None else table + inputs.bonus, table.shape[1])
        mass = math.inf if self.config.p >= 1 else self.config.p
        takes = until_mass(table.gather(1, order), mass)
        return self.taking(scores, order, takes, inputs)


@dataclass(frozen=True, kw_only=True)
class Entropy(Loss):
    """Mean entropy of the tokens' probabilities, in nats: fewer experts reach p where it is low."""

    name = "entropy"
    own = 1e-4
    needs = ("has_probs",)

    @property
    def is_mean(self) -> bool:
        return True

    def __call__(self, given: LossInput) -> Tensor:
        probs = given.routing.probs
        assert probs is not None
        # The bound keeps the gradient finite where a probability underflows.
        entropy = -(probs * probs.clamp_min(1e-30).log()).sum(-1)
        return mean_over_valid(entropy, given.routing, given.context.data_group)


CARD = Card(
    name="dynamic_top_p",
    title="Dynamic top-p",
    summary="as many experts as a probability of p needs, and an entropy loss",
    paper="2403.07652",
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=TopP), Row(table=LOSSES, kind=Entropy)),
    options={
        "router": "dynamic_top_p",
        "capacity": "none",
        "normalize": "none",
        "losses": "balance,entropy",
    },
    against="token_choice/top_k=2/capacity=none",
    moves=("loss", "load", "experts per token", "FLOPs"),
    claim=(
        "The chosen experts hold at least p of the probability, and no smaller set does; p = 0 "
        "gives one expert and p = 1 all."
    ),
    departs=(
        "The sum must reach p; the released code wants it exceeded, which differs where it is p "
        "exactly."
    ),
)
