"""DynaMoE: experts above a percentile of a batch's probabilities; unequal layers (2603.01697)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.methods.card import Card, Row
from etr.moe.context import RouterInput
from etr.moe.learner import Learner, Seen, Step
from etr.moe.routers import ROUTERS, Router, RouterConfig, RouterTraits
from etr.moe.routers.linear import SoftmaxRouter
from etr.moe.routing import Routing, Scores
from etr.moe.select import top_experts

DECAY = 0.9
"""Part of the running percentile that survives one optimizer step."""


@dataclass(frozen=True, kw_only=True)
class Percentile(RouterConfig):
    """Each token takes the experts whose probability reaches a percentile of all of the batch's.

    Tokens that are sure take few, others many; every token takes its best.
    """

    name = "dynamoe"
    paper = "2603.01697"
    summary = "learned linear router, experts above a percentile of the batch's probabilities"

    quantile: float = 0.75
    """Share of a batch's probabilities, of all tokens and experts, that lie below: 0 takes all."""
    most: int | None = None
    """Most experts of a token, its best ones; None for all."""
    sees: Literal["batch", "before"] = "batch"
    """Whose percentile. batch: in training the batch's own, so that later tokens change earlier
    ones. before: the running mean of earlier steps, by which tokens are served in any case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile={self.quantile} must lie in [0, 1]")
        if self.most is not None and self.most < 1:
            raise ValueError(f"most={self.most} must be at least 1 expert, or None")

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            causal=self.sees == "before",
            fixed_k=False,
            normalize="chosen",
            has_scores=False,
            rank_by=("position",),
            default_capacity="none",
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _PercentileRouter(self, hidden_size, num_experts, top_k)


class RunningPercentile(Learner):
    """Running mean of batches' percentiles, float32 []; 1 / E before the first step.

    Args:
        num_experts: E.
    """

    value: Tensor
    num_updates: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_state("value", (), 1 / num_experts)
        self.register_state("num_updates", (), 0, torch.int64)

    def observe(self, seen: Seen) -> dict[str, Tensor]:
        return dict(seen.routing.counters)

    def after_step(self, step: Step) -> None:
        if "percentiles" not in step.counters:  # choices were replayed
            return
        count = step.counters["num_valid_tokens"]
        found = step.counters["percentiles"] / count.clamp_min(1)
        moved = torch.where(self.num_updates > 0, DECAY * self.value + (1 - DECAY) * found, found)
        self.value.copy_(torch.where(count > 0, moved, self.value))
        self.num_updates += count > 0


def percentile(probs: Tensor, valid: Tensor, quantile: float) -> Tensor:
    """Quantile of all probabilities of valid tokens, linear between two; 0 without any.

    Args:
        probs: float [T, E].
        valid: bool [T].
    Returns:
        float64 [].
    """
    table = probs.double().masked_fill(~valid[:, None], torch.inf).flatten().sort().values
    table = F.pad(table, (0, 1))  # something to read where there is nothing
    count = valid.sum() * probs.shape[1]
    place = quantile * (count - 1).clamp_min(0).double()
    low = place.floor().long()[None]
    high = torch.minimum(low + 1, (count - 1).clamp_min(0))
    below, above = table.index_select(0, low)[0], table.index_select(0, high)[0]
    return torch.where(count > 0, below + (above - below) * (place - low[0]), 0.0)


class _PercentileRouter(SoftmaxRouter):
    config: Percentile

    def __init__(self, config: Percentile, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.running = RunningPercentile(num_experts)

    def choose_alone(self, scores: Scores, inputs: RouterInput) -> Routing:
        return self._above(self.running.value.double(), scores, inputs)

    def choose(self, scores: Scores, inputs: RouterInput) -> Routing:
        probs, valid = inputs.of_all_ranks(self.preferences(scores))
        found = percentile(probs, valid, self.config.quantile)
        bound = found if self.config.sees == "batch" else self.running.value.double()
        weight = inputs.valid_mask.sum()  # this rank's part in the mean
        return replace(self._above(bound, scores, inputs), counters={"percentiles": found * weight})

    def _above(self, bound: Tensor, scores: Scores, inputs: RouterInput) -> Routing:
        table = self.preferences(scores)
        order = top_experts(table, self.num_experts)
        takes = table.gather(1, order).double() >= bound - 1e-9
        takes[:, 0] = True
        if self.config.most is not None:
            takes[:, self.config.most :] = False
        return self.taking(scores, order, takes, inputs)


SHAPES: dict[str, Callable[[float], float]] = {
    "uniform": lambda u: 1.0,
    "descending": lambda u: (1 - u) ** 2 + 0.05,
    "ascending": lambda u: u**2 + 0.05,
    "pyramid_up": lambda u: 1 - abs(2 * u - 1) + 0.05,
    "pyramid_down": lambda u: abs(2 * u - 1) + 0.05,
    "wave": lambda u: 1 + math.sin(2 * math.pi * u) + 0.05,
}
"""How many experts a layer has for others, by its place from 0, the first, to 1, the last."""


def experts_of_layers(shape: str, layers: int, total: int, least: int = 1) -> list[int]:
    """Experts of each MoE layer, `total` in all: for ``EtrConfig.from_base(layers=...)``.

    Args:
        shape: one of `SHAPES`.
        layers: MoE layers.
        total: experts of all layers.
        least: experts of each at least.
    Raises:
        ValueError: the shape is unknown, or there are too few experts.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is unknown; choose one of {', '.join(SHAPES)}")
    if layers < 1 or least < 1 or total < layers * least:
        raise ValueError(
            f"total={total} experts are too few for layers={layers} of at least {least}"
        )
    weights = [SHAPES[shape](place / max(layers - 1, 1)) for place in range(layers)]
    exact = [least + (total - least * layers) * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    rest = sorted(range(layers), key=lambda place: (counts[place] - exact[place], place))
    for place in rest[: total - sum(counts)]:
        counts[place] += 1
    return counts


CARD = Card(
    name="dynamoe",
    title="DynaMoE",
    summary="experts above a percentile of the batch's probabilities; layers of unequal size",
    paper=Percentile.paper,
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=Percentile),),
    options={"router": "dynamoe"},
    against="token_choice/top_k=2/capacity=none",
    moves=("loss", "experts per token", "FLOPs"),
    claim=(
        "At the 75th percentile of 8 experts tokens take 2 +- 0.1 on average with a deviation over "
        "0.5, and more the less sure they are (correlation with the entropy over 0.3); a "
        "percentile of a token's own logits gives each token 2."
    ),
    departs=(
        "The percentile is of all probabilities of a batch, and served by its running mean. The "
        "formulas of the six shapes were not seen; those here have the same names and totals."
    ),
)
