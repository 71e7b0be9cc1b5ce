"""QuantMoE-Bench: which of an expert's matrices get more bits (2406.08155)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS
from etr.model.bits import FewBits, bits_a_weight, matrices
from etr.model.experts import best
from etr.model.transform import Stats
from etr.moe.collector import Collected
from etr.moe.config import MoEConfig
from etr.moe.experts.packed import WHOLE
from etr.moe.layer import MoE
from etr.moe.view import LayerView

Score = Literal["outlier", "block", "lowest", "random"]
SAMPLE = 4096
"""Tokens of a layer that a network is fitted to."""
STEPS = 300
"""Steps of that, of 256 tokens."""


@dataclass(frozen=True, kw_only=True)
class QuantMoe(FewBits):
    """Rounds the experts' matrices to few bits, more of them where weights stand out.

    A matrix's score is the highest, over the columns of its inputs, of the largest weight over the
    mean one. Matrices of the highest scores get `high` bits, so that bits are `average` a weight.
    Each row is rounded to even steps between its lowest and its highest weight.

    Or whole layers get more bits, those first that turn tokens most: a small network learns, of
    each layer on your text, the cosine of input and output from the input, and its mean is the
    layer's score, the lowest first. Within the layer where bits run out matrices go by theirs.
    """

    name = "quantmoe"
    summary = "experts of few bits a weight, more for the matrices in which weights stand out"
    needs = ("outputs",)

    low: int = 2
    """Bits of most matrices: 2, 4, 8, or 16 for none; 3 with store=plain alone."""
    high: int = 4
    """Bits of the others."""
    average: float = 2.5
    """Bits of a weight on average, scales apart."""
    score: Score = "outlier"
    """Who gets more bits. outlier: matrices by weights. block: layers, by your text. lowest and
    random are there to compare with."""
    seed: int = 0
    """Of random scores, and of the network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_bits("low", "high")
        if not self.low <= self.average <= self.high:
            raise ValueError(
                f"average={self.average} must lie between low={self.low} and high={self.high}"
            )
        if self.score not in ("outlier", "block", "lowest", "random"):
            raise ValueError(f"score={self.score!r} must be one of outlier, block, lowest, random")

    def changes_function(self) -> str | None:
        return None if self.low == WHOLE else f"weights have {self.average} bits on average"

    @property
    def measures(self) -> bool:
        return self.score == "block"

    def observe(self, view: LayerView) -> Stats:
        assert view.output is not None
        x, output = (value[view.routing.valid_mask].float() for value in (view.x, view.output))
        return {"x": x[:SAMPLE], "cosine": cosine_similarity(x, output, dim=-1)[:SAMPLE]}

    def gather(self, total: Stats, more: Stats) -> Stats:
        if not total:
            return more
        return {name: torch.cat([total[name], more[name]])[:SAMPLE] for name in more}

    def inspect(self, layer: Collected, stats: Stats) -> Stats:
        assert isinstance(layer, MoE)
        values = {
            name: value.detach() for part in layer.bank.parts for name, value in part.weights()
        }
        found = {"score": torch.tensor([scores_of(m) for m in matrices(values)]).double()}
        if self.measures:
            network = fitted(stats["x"], stats["cosine"], self.seed)
            found["expected"] = network(stats["x"]).double().mean()
        return found

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        scores = [one["score"] for one in stats]
        flat = torch.cat(scores)
        if self.score == "lowest":
            flat = -flat
        if self.score == "block":
            flat = torch.cat(_by_layer([float(one["expected"]) for one in stats], scores))
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
        plan: dict[str, Any] = {"bits": found, "score": [score.tolist() for score in scores]}
        if self.score == "block":
            for name, key in (("expected_cosine", "expected"), ("cosine", "cosine")):
                plan[name] = [float(one[key].double().mean()) for one in stats]
        return plan

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


def fitted(x: Tensor, cosine: Tensor, seed: int) -> nn.Module:
    """A network of 1,024 hidden units that expects cosines of tokens, [T, H] to [T].

    AdamW at 1e-4 on the squared error.

    Args:
        x: what it sees, [T, H].
        cosine: what it is to expect, [T].
        seed: of its weights and of the order of tokens.
    """
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(seed)
        layers = nn.Linear(x.shape[1], 1024, bias=False), nn.ReLU(), nn.Linear(1024, 1), nn.Tanh()
        network = nn.Sequential(*layers, nn.Flatten(0)).to(x.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        with torch.enable_grad():
            for _ in range(STEPS):
                rows = torch.randint(len(x), (256,), device=x.device)
                mse_loss(network(x[rows]), cosine[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return network


def _by_layer(expected: Sequence[float], scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores of matrices in which those of layers with lower cosines are all higher."""
    order = sorted(range(len(expected)), key=expected.__getitem__, reverse=True)
    found = [torch.zeros(0)] * len(expected)
    for rank, place in enumerate(order):
        score = scores[place]
        found[place] = rank + (score - score.min()) / (2 * (score.max() - score.min()) + 1e-300)
    return found


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
        "Rounded to nearest, not by GPTQ; the scorers of matrices and of blocks, without rules of "
        "thumb. Of blocks the form without the residual stream, on the text that it was fitted to. "
        "Experts alone get fewer bits. That the loss gains by either score was not seen: it is "
        "printed, not claimed."
    ),
)
