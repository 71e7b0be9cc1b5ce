"""OmniMoE: very many experts of width 1, found by product keys (arXiv 2602.05711)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from etr.methods.card import Card, Row
from etr.moe.context import RouterInput
from etr.moe.experts import BANKS, Bank, BankConfig, ExpertSizes
from etr.moe.experts.uniform import Experts
from etr.moe.learner import Learner, Seen, Step
from etr.moe.routers import ROUTERS, Router, RouterConfig, RouterTraits
from etr.moe.routing import Routing, Scores
from etr.moe.select import top_experts

EPSILON = 1e-5
"""Added to variances."""


@dataclass(frozen=True, kw_only=True)
class ProductKeys(RouterConfig):
    """Token choice of experts that stand in a grid, each scored by its row and its column.

    The grid is the most square one: n x n for n^2 experts. Expert ``row * columns + column`` has
    the probability of its row times that of its column, by a softmax over each, which weighs it.
    The k best are found among the k best rows and columns: no table of all experts is made.
    """

    name = "product_keys"
    paper = "2602.05711, 1907.05242"
    summary = "experts in a grid, scored by softmaxes over its rows and columns, top-k per token"

    norm: bool = False
    """Logits of each row and column have mean 0 and variance 1 over the tokens of a batch, on all
    ranks together, in training; in eval mode by running means."""
    momentum: float = 0.1
    """Part of the running means that an optimizer step replaces."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum={self.momentum} must lie in (0, 1]")

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            causal=not self.norm,
            normalize="none",
            has_scores=False,
            has_probs=False,
            rank_by=("position",),
            default_capacity="none",
            numbered=True,
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _ProductKeyRouter(self, hidden_size, num_experts, top_k)


def grid_of(num_experts: int) -> tuple[int, int]:
    """Rows and columns of the most square grid of so many experts, no more rows than columns."""
    rows = next(n for n in range(math.isqrt(num_experts), 0, -1) if num_experts % n == 0)
    return rows, num_experts // rows


class GridScores(Scores):
    """Scores of a grid, whose tables [T, E] are made where somebody asks for them.

    Args:
        rows, columns: log-probabilities, float [T, R] and [T, C].
        counters: of the router's learner.
    """

    rows: Tensor
    columns: Tensor
    counters: dict[str, Tensor]
    logits = probs = None

    def __init__(self, rows: Tensor, columns: Tensor, counters: dict[str, Tensor]) -> None:
        for name, value in (("rows", rows), ("columns", columns), ("counters", counters)):
            object.__setattr__(self, name, value)

    @property
    def gates(self) -> Tensor:
        return (self.rows[:, :, None] + self.columns[:, None]).flatten(1).exp()

    @property
    def scores(self) -> Tensor:
        return self.gates

    def gates_of(self, expert: Tensor) -> Tensor:
        width = self.columns.shape[1]
        row = self.rows.gather(1, expert.div(width, rounding_mode="floor"))
        return (row + self.columns.gather(1, expert % width)).exp()

    def best(self, k: int) -> Tensor:
        """Each token's k best experts, int64 [T, k], best first; equal ones by number."""
        rows, columns = self.rows.detach(), self.columns.detach()
        # In order of their numbers, so that of equal sums the first has the lower one.
        row = top_experts(rows, min(k, rows.shape[1])).sort(dim=1).values
        column = top_experts(columns, min(k, columns.shape[1])).sort(dim=1).values
        sums = rows.gather(1, row)[:, :, None] + columns.gather(1, column)[:, None]
        number = row[:, :, None] * columns.shape[1] + column[:, None]
        return number.flatten(1).gather(1, top_experts(sums.flatten(1), k))


class BatchNorm(Learner):
    """Mean and variance of logits, without a learned scale: running ones, float32 [N] each.

    Args:
        width: N.
        momentum: see `ProductKeys`.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_state("mean", (width,), 0.0)
        self.register_state("variance", (width,), 1.0)

    def normalized(self, logits: Tensor, inputs: RouterInput) -> Tensor:
        """Logits [T, N] by the batch's statistics where it trains, and else by running ones.

        A batch of a single token has no variance, and takes the running ones too.
        """
        mean, variance = self.mean.to(logits.dtype), self.variance.to(logits.dtype)
        if inputs.learns:
            count, total = _sums(logits, inputs)
            own = total / count.clamp_min(1)
            square = _sums((logits - own).square(), inputs)[1] / count.clamp_min(1)
            mean, variance = (
                torch.where(count > 1, found, kept)
                for found, kept in ((own, mean), (square, variance))
            )
        return (logits - mean) * (variance + EPSILON).rsqrt()

    def observe(self, seen: Seen) -> dict[str, Tensor]:
        return dict(seen.routing.counters)

    def after_step(self, step: Step) -> None:
        """Move towards mean and (unbiased) variance of all tokens of the step."""
        count = step.counters["num_valid_tokens"].double()
        mean = step.counters["logit_sums"] / count.clamp_min(1)
        square = step.counters["logit_squares"] - count * mean.square()
        variance = square.clamp_min(0) / (count - 1).clamp_min(1)
        for kept, found in ((self.mean, mean), (self.variance, variance)):
            moved = torch.lerp(kept.double(), found, self.momentum)
            kept.copy_(torch.where(count > 1, moved, kept))


def _sums(values: Tensor, inputs: RouterInput) -> tuple[Tensor, Tensor]:
    """Number of the real tokens of all ranks, [1], and sums of their values [T, N], [N]."""
    mask = inputs.valid_mask[:, None].to(values.dtype)
    own = torch.cat((mask.sum(0), (values * mask).sum(0)))
    if inputs.gather is not None:
        own = inputs.gather(own[None]).sum(0)
    return own[:1], own[1:]


class _ProductKeyRouter(Router):
    """``rows`` [R, H] and ``columns`` [C, H]."""

    config: ProductKeys

    def __init__(self, config: ProductKeys, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.grid = grid_of(num_experts)
        self.rows, self.columns = (
            nn.Parameter(torch.empty(size, hidden_size)) for size in self.grid
        )
        self.norm = BatchNorm(sum(self.grid), config.momentum) if config.norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.rows, self.columns):
            nn.init.normal_(weight, std=self.hidden_size**-0.5)

    def scores(self, x: Tensor, inputs: RouterInput) -> GridScores:
        logits, counters = x @ torch.cat((self.rows, self.columns)).to(x.dtype).T, {}
        if self.norm is not None:
            if inputs.learns:
                real = logits.detach().double() * inputs.valid_mask[:, None]
                counters = {"logit_sums": real.sum(0), "logit_squares": real.square().sum(0)}
            logits = self.norm.normalized(logits, inputs)
        rows, columns = (part.log_softmax(-1) for part in logits.split(self.grid, dim=1))
        return GridScores(rows, columns, counters)

    def choose_alone(self, scores: Scores, inputs: RouterInput) -> Routing:
        assert isinstance(scores, GridScores)
        return self.routing_of(scores, scores.best(self.top_k), inputs, all_used=True)

    def routing_of(
        self, scores: Scores, expert: Tensor, inputs: RouterInput, *, all_used: bool = False
    ) -> Routing:
        assert isinstance(scores, GridScores)
        found = super().routing_of(scores, expert, inputs, all_used=all_used)
        if not scores.counters:
            return found
        counted = replace(found, counters=scores.counters)
        return counted.known(full=found.full, unbiased=found.unbiased)


@dataclass(frozen=True, kw_only=True)
class Atoms(BankConfig):
    """Experts ``down silu(up x)`` of width 1, whatever width and activation the layer's others
    have."""

    name = "atoms"
    summary = "experts of width 1, two vectors each"

    def build(self, sizes: ExpertSizes) -> Bank:
        return AtomicExperts(replace(sizes, intermediate_size=1, activation="silu"))


class AtomicExperts(Experts):
    """``up_proj`` [E, 1, H] and ``down_proj`` [E, H, 1]."""

    backend = "by_row"


CARD = Card(
    name="omnimoe",
    title="OmniMoE",
    summary="experts of width 1 in a grid, found by their row and column, beside a shared one",
    paper="2602.05711",
    level="model",
    branch="expert design",
    rows=(Row(table=ROUTERS, kind=ProductKeys), Row(table=BANKS, kind=Atoms)),
    options={
        "router": "product_keys:norm=true",
        "experts": "atoms",
        "num_experts": "1024",
        "top_k": "8",
        "num_shared_experts": "1",
        "capacity": "none",
    },
    against="token_choice/num_experts=4/capacity=none",
    moves=("loss", "load", "memory"),
    claim=(
        "The 16 best of 32 x 32 experts are those of the whole table. 256 atoms, 8 a token, beside "
        "a small shared expert reach at most a quarter of the error of a feed-forward of as many "
        "active parameters, and use at least 90 % of the atoms."
    ),
    departs=(
        "Statistics of logits are those of all ranks' tokens, and running ones move once per "
        "optimizer step; norm=false is without them, and causal. A number of experts that is not "
        "a square makes the most square grid; the released code leaves some out. Atoms start as "
        "other experts do; the claim's start as published, with outputs of a tenth, and end at an "
        "error of 0.060 where the feed-forward has 0.447, and 0.040 without norm. There is no "
        "balance loss, for there is no table of probabilities."
    ),
)
