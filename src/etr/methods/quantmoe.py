"""QuantMoE-Bench: which of an expert's matrices get more bits (2406.08155)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS
from etr.model.bits import FewBits, bits_a_weight, matrices
from etr.model.experts import best
from etr.model.transform import Stats
from etr.moe.collector import Collected
from etr.moe.config import MoEConfig
from etr.moe.experts.packed import WHOLE
from etr.moe.layer import MoE

Score = Literal["outlier", "lowest", "random"]


@dataclass(frozen=True, kw_only=True)
class QuantMoe(FewBits):
    """Rounds the experts' matrices to few bits, more of them where weights stand out.

    A matrix's score is the highest, over the columns of its inputs, of the largest weight over the
    mean one. Matrices of the highest scores get `high` bits, so that bits are `average` a weight.
    Each row is rounded to even steps between its lowest and its highest weight.
    """

    name = "quantmoe"
    summary = "experts of few bits a weight, more for the matrices in which weights stand out"

    low: int = 2
    """Bits of most matrices: 2, 4, 8, or 16 for none; 3 with store=plain alone."""
    high: int = 4
    """Bits of the others."""
    average: float = 2.5
    """Bits of a weight on average, scales apart."""
    score: Score = "outlier"
    """Who gets more bits. lowest and random are there to compare with."""
    seed: int = 0
    """Of random scores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_bits("low", "high")
        if not self.low <= self.average <= self.high:
            raise ValueError(
                f"average={self.average} must lie between low={self.low} and high={self.high}"
            )
        if self.score not in ("outlier", "lowest", "random"):
            raise ValueError(f"score={self.score!r} must be one of outlier, lowest, random")

    def changes_function(self) -> str | None:
        return None if self.low == WHOLE else f"weights have {self.average} bits on average"

    def inspect(self, layer: Collected, stats: Stats) -> Stats:
        assert isinstance(layer, MoE)
        values = {
            name: value.detach() for part in layer.bank.parts for name, value in part.weights()
        }
        return {"score": torch.tensor([scores_of(m) for m in matrices(values)]).double()}

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        scores = [one["score"] for one in stats]
        flat = torch.cat(scores)
        if self.score == "lowest":
            flat = -flat
        if self.score == "random":
            flat = torch.rand(len(flat), generator=torch.Generator().manual_seed(self.seed))
        sizes = torch.cat(
            [
                torch.full((len(score),), layer.hidden_size * layer.intermediate_size)
                for score, layer in zip(scores, layers, strict=True)
            ]
        ).double()
        bits, start = self._within_budget(flat, sizes), 0
        found: list[list[int]] = []
        for alone, score, layer in zip(self.protected(layers), scores, layers, strict=True):
            own = bits[start : start + len(score)]
            each = len(score) // layer.num_experts
            found.append([WHOLE if i // each in alone else b for i, b in enumerate(own)])
            start += len(score)
        return {"bits": found, "score": [score.tolist() for score in scores]}

    def _within_budget(self, score: Tensor, sizes: Tensor) -> list[int]:
        """Bits of each matrix: high for the highest scores, as far as the average goes."""
        if self.low == self.high:
            return [self.low] * len(score)
        order = score.argsort(descending=True, stable=True)
        room = (self.average - self.low) / (self.high - self.low) * sizes.sum()
        fits = int((sizes[order].cumsum(0) <= room + 1e-6).sum())
        return [self.high if more else self.low for more in best(score, fits).tolist()]

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        bits = bits_a_weight(plan, layers)
        return f"{bits:.4g} bits a weight of the experts, and 64 for the scale of each row"


def scores_of(weight: Tensor) -> float:
    """The highest over columns of the largest weight over the mean one; a column of zeros has 0."""
    size = weight.double().abs()
    return float((size.amax(0) / size.mean(0).clamp_min(1e-300)).max())


CARD = Card(
    name="quantmoe",
    title="QuantMoE-Bench",
    summary="experts of few bits a weight, more for the matrices in which weights stand out",
    paper="2406.08155",
    level="model",
    branch="quantization",
    rows=(Row(table=TRANSFORMS, kind=QuantMoe),),
    moves=("loss", "bytes", "memory"),
    claim=(
        "Of 48 matrices of experts 6 that are given 6 outliers of 12 times their size have the 6 "
        "highest scores; 12 of 48 at 4 bits and 36 at 2 are 2.5 bits a weight, to the byte; what "
        "is packed computes what is rounded, bit for bit, and 16 bits are the identity."
    ),
    departs=(
        "Rounded to nearest, not by GPTQ; the scorer of matrices alone, without the one of blocks "
        "and without rules of thumb. Experts alone get fewer bits. That the loss gains by the "
        "scores was not seen: it is printed, not claimed."
    ),
)
