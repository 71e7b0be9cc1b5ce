"""MoE++: experts that compute nothing, and routers that read the layer before (2410.07348)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etr.methods.card import Card, Row
from etr.moe.context import RouterInput
from etr.moe.experts import BANKS, BankConfig, ExpertSizes
from etr.moe.experts.nulls import weights_from
from etr.moe.experts.uniform import Experts
from etr.moe.losses import LOSSES, Loss, LossInput
from etr.moe.losses.balance import shares
from etr.moe.routers import ROUTERS, Router, RouterConfig, RouterTraits
from etr.moe.routers.linear import SoftmaxRouter
from etr.moe.routing import Routing, Scores, Selection


@dataclass(frozen=True, kw_only=True)
class GatingResidual(RouterConfig):
    """Token choice by a linear score, to which the logits of the layer before are added, mapped."""

    name = "gating_residual"
    paper = "2410.07348"
    summary = "learned linear router that also reads the logits of the layer before"

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            reads_before=True, normalize="none", rank_by=("position",), default_capacity="none"
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _GatingResidualRouter(self, hidden_size, num_experts, top_k)


class _GatingResidualRouter(SoftmaxRouter):
    """``residual`` [E, E] maps the logits of the layer before; it starts at 0."""

    def __init__(
        self, config: RouterConfig, hidden_size: int, num_experts: int, top_k: int
    ) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.residual = nn.Parameter(torch.zeros(num_experts, num_experts))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.residual)

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        logits, before = self.logits(x), inputs.before
        if before is None:
            # The first layer's has a gradient too, which ranks that share a batch expect.
            before = x.new_zeros(x.shape[0], self.num_experts)
        if before.shape != logits.shape:
            raise ValueError(
                f"router 'gating_residual' has {self.num_experts} experts for {x.shape[0]} tokens, "
                f"and the logits of the layer before are {list(before.shape)}; layers must be alike"
            )
        logits = logits + before.to(x.dtype) @ self.residual.to(x.dtype).T
        return self.of_logits(logits)


@dataclass(frozen=True, kw_only=True)
class ZeroComputation(BankConfig):
    """Equal experts, and choices beside them that cost next to nothing, in this order."""

    name = "zero_computation"
    summary = "equal experts; further choices add nothing, the token, or a mix of it and a vector"

    zero: int = 1
    """Choices that add nothing."""
    copy: int = 1
    """Choices that add the token."""
    constant: int = 2
    """Choices that add a mean of the token and a learned vector, weighed by the token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("zero", "copy", "constant"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} choices must be at least 0")

    def num_choices(self, num_experts: int) -> int:
        return num_experts + self.zero + self.copy + self.constant

    def build(self, sizes: ExpertSizes) -> ZeroComputationExperts:
        return ZeroComputationExperts(sizes, self)


class ZeroComputationExperts(Experts):
    """``constants`` [n, H] and ``mixes`` [n, 2, H] beside the experts' weights.

    Args:
        sizes: of the experts with weights.
        config: which other choices there are.
    """

    def __init__(self, sizes: ExpertSizes, config: ZeroComputation) -> None:
        super().__init__(sizes)
        self.counts = (config.zero, config.copy, config.constant)
        self.constants = nn.Parameter(torch.empty(config.constant, sizes.hidden_size))
        self.mixes = nn.Parameter(torch.empty(config.constant, 2, sizes.hidden_size))
        self.reset_parameters()

    def idle(self, x: Tensor, routing: Routing, selection: Selection) -> Tensor | None:
        if not any(self.counts[1:]):
            return None
        weights = weights_from(routing, selection, self.num_experts).to(x.dtype)
        _, copies, constants = weights.split(self.counts, dim=1)
        share = torch.einsum("th,cjh->tcj", x, self.mixes.to(x.dtype)).softmax(-1)
        of_token = copies.sum(1) + (constants * share[..., 0]).sum(1)
        return x * of_token[:, None] + (constants * share[..., 1]) @ self.constants.to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class UnevenBalance(Loss):
    """Load times probability, summed over choices, those without weights by less.

    1 where load or probabilities are even, and no choice is without weights.
    """

    name = "uneven_balance"
    own = 0.01
    needs = ("has_probs", "tokens_choose")
    one_when_even = True

    free: float = 0.75
    """What choices without weights count, where experts count 1; less of it lets them have more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.free < float("inf"):
            raise ValueError(f"free={self.free} of loss {self.name!r} must be >= 0 and finite")

    def __call__(self, given: LossInput) -> Tensor:
        share, mean = shares(given.routing, given.load("ranks"), given.context.data_group)
        counted = torch.where(given.free, self.free * share, share)
        return len(given.meant) * (counted * mean).sum()


CARD = Card(
    name="moe_pp",
    title="MoE++",
    summary="choices that compute nothing, less pressure on their load, and gating residuals",
    paper="2410.07348",
    level="model",
    branch="expert design",
    rows=(
        Row(table=BANKS, kind=ZeroComputation),
        Row(table=ROUTERS, kind=GatingResidual),
        Row(table=LOSSES, kind=UnevenBalance),
    ),
    options={
        "experts": "zero_computation",
        "router": "gating_residual",
        "losses": "uneven_balance",
    },
    against="token_choice/top_k=2/capacity=none",
    moves=("loss", "load", "experts per token", "FLOPs"),
    claim=(
        "Where a third of the tokens must stay as they are, a third take a vector and a third a "
        "map, tokens with a map take at least 0.4 experts more of top_k = 2 than those that stay, "
        "and all of them 1.5 or fewer, as means of 3 seeds."
    ),
    departs=(
        "The balance loss has the factor N / K that the paper's lacks, and residuals start at 0. "
        "Nothing is dropped; capacity=factor:nulls=4,free=0.75 has the paper's room, times top_k, "
        "which its formula lacks. Single seeds differ more than the published thirds do."
    ),
)
