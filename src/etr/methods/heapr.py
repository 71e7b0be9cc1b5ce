"""HEAPr: prune neurons of experts by what the loss would rise, to second order (2509.22299)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors
from etr.model.experts import (
    Calibrated,
    Values,
    best,
    check_numbers,
    lists_of,
    rebuilt,
    shared_width,
)
from etr.model.transform import Stats
from etr.moe.config import MoEConfig
from etr.moe.experts.runs import text_of
from etr.moe.experts.widths import Widths
from etr.moe.view import LayerView
from etr.moe.watch import expert_neurons

Score = Literal["heapr", "activation", "random"]


@dataclass(frozen=True, kw_only=True)
class Heapr(Calibrated):
    """Prunes the neurons of all experts whose loss would raise the loss of the text least.

    A neuron of an expert is a row of its up projections and a column w of its down projection. Its
    score is half the mean of its squared activation times the mean of (g w)^2, both over the tokens
    that the expert kept; g is the gradient of the loss by the expert's output. Experts are then of
    unequal widths, 0 among them.
    """

    name = "heapr"
    summary = "prune neurons of experts, over all layers, by their second-order effect on the loss"
    needs = ("gradients",)

    ratio: float = 0.25
    """Share of the neurons that go."""
    score: Score = "heapr"
    """By which neurons stay. activation: by the sum of the squared activation times w^2, over all
    tokens. random: by chance. Both are there to compare with."""
    store: Literal["widths", "padded"] = "widths"
    """widths: experts are stored as wide as they are. padded: with zeros, as wide as the widest of
    the model or the next multiple of 8, which families of transformers can hold."""
    seed: int = 0
    """Of random scores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} must be a share of the neurons, 0 to 1")
        if self.score not in ("heapr", "activation", "random"):
            raise ValueError(f"score={self.score!r} must be one of heapr, activation, random")
        if self.store not in ("widths", "padded"):
            raise ValueError(f"store={self.store!r} must be widths or padded")

    def changes_function(self) -> str | None:
        return f"ratio={self.ratio} of the neurons are gone" if self.ratio else None

    def observe(self, view: LayerView) -> Stats:
        assert view.gradient is not None
        weight, gradient = view.selection.combine_weight.double(), view.gradient.double()
        squares, effects, norms, tokens = [], [], [], []
        for pair, active, down in expert_neurons(view):
            g = weight[pair, None] * gradient[view.routing.token[pair]]
            squares.append(active.double().square().sum(0))
            effects.append((g @ down.double()).square().sum(0))
            norms.append(down.double().square().sum(0) * squares[-1])
            tokens.append(len(pair))
        return {
            "squares": torch.stack(squares),
            "effects": torch.stack(effects),
            "norms": torch.stack(norms),
            "tokens": torch.tensor(tokens),
        }

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        scores = [self._scores(one, generator) for one in stats]
        judged = self.judged([one["tokens"] for one in stats], scores, layers)
        flat = torch.cat([score.flatten() for score in judged])
        going = int(self.ratio * len(flat) + 1e-6)
        stay = best(flat, max(len(flat) - going, int(flat.isposinf().sum())))
        kept, keep = stay.split([score.numel() for score in judged]), []
        for mask, score in zip(kept, judged, strict=True):
            rows = mask.view(score.shape)
            keep.append([row.nonzero().flatten().tolist() for row in rows])
        return {"keep": keep, "tokens": [one["tokens"].tolist() for one in stats]}

    def _scores(self, stats: Stats, generator: torch.Generator) -> Tensor:
        """Of each neuron, [E, I]."""
        if self.score == "random":
            return torch.rand(stats["squares"].shape, generator=generator, dtype=torch.float64)
        if self.score == "activation":
            return stats["norms"]
        count = stats["tokens"].clamp_min(1)[:, None].double()
        return 0.5 * (stats["squares"] / count) * (stats["effects"] / count)

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        widths = [len(kept) for layer in plan["keep"] for kept in layer]
        total = sum(layer.num_experts * layer.intermediate_size for layer in layers)
        return (
            f"keeps {sum(widths)} of {total} neurons; experts are {min(widths)} to {max(widths)} "
            "wide"
        )

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        for place, (keep, layer) in enumerate(
            zip(lists_of(plan, "keep", layers), layers, strict=True)
        ):
            if not isinstance(keep, list) or len(keep) != layer.num_experts:
                raise ValueError(
                    f"the plan's 'keep' of layer {place} must name the neurons of "
                    f"{layer.num_experts} experts"
                )
            for expert, numbers in enumerate(keep):
                what = f"kept neurons of expert {expert} of layer {place}"
                check_numbers(numbers, layer.intermediate_size, what)

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        keep = plan["keep"][place]
        width = tensors["experts.down_proj"].shape[-1]
        common = self._common_width(plan, place, width)
        if common is None:
            return rebuilt(tensors, lambda values: cut(values, keep))
        if common == width and all(len(kept) == width for kept in keep):
            return tensors
        return rebuilt(tensors, lambda values: _part(values, range(len(keep)), keep, common))

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        common = self._common_width(plan, place, layer.intermediate_size)
        if common is None:
            widths = text_of(map(len, plan["keep"][place]))
            return replace(layer, experts=Widths(widths=widths))
        if common == layer.intermediate_size:
            return layer
        shared = shared_width(layer)
        return replace(layer, intermediate_size=common, shared_intermediate_size=shared)

    def _common_width(self, plan: Any, place: int, before: int) -> int | None:
        """Width of all experts of a layer as they are stored; None where it is their own.

        With zeros it is a multiple of 8, which kernels ask for, or what it was before.
        """
        if self.store == "padded":
            widest = max(1, *(len(kept) for layer in plan["keep"] for kept in layer))
            return min(before, -(-widest // 8) * 8)
        widths = {len(kept) for kept in plan["keep"][place]}
        return widths.pop() if len(widths) == 1 and 0 not in widths else None


def cut(values: Values, keep: Sequence[Sequence[int]]) -> Values:
    """Experts with the neurons that stay: a part for each run of equal widths, as in `Widths`."""
    found: Values = {}
    start = 0
    for number, (width, run) in enumerate(groupby(map(len, keep))):
        stop = start + len(list(run))
        part = _part(values, range(start, stop), keep, width)
        found |= {f"groups.{number}.{name}": value for name, value in part.items()}
        start = stop
    return found


def _part(
    values: Values, experts: Sequence[int], keep: Sequence[Sequence[int]], width: int
) -> Values:
    """Some experts with the neurons that stay, and zeros up to a width."""
    found = {}
    for name, value in values.items():
        rows = [value[expert] for expert in experts]
        if name != "down_proj_bias":
            dim = -1 if name == "down_proj" else 0
            halves = 2 if name.startswith("gate_up") else 1
            rows = [
                _chosen(row, keep[expert], width, dim, halves)
                for row, expert in zip(rows, experts, strict=True)
            ]
        found[name] = torch.stack(rows)
    return found


def _chosen(row: Tensor, numbers: Sequence[int], width: int, dim: int, halves: int) -> Tensor:
    """Some of a tensor's neurons, of both halves where there are two."""
    index = torch.tensor(numbers, dtype=torch.int64, device=row.device)
    missing = [0] * (2 * (row.ndim - 1 - dim % row.ndim)) + [0, width - len(numbers)]
    pieces = (half.index_select(dim, index) for half in row.chunk(halves, dim))
    return torch.cat([pad(piece, missing) for piece in pieces], dim)


CARD = Card(
    name="heapr",
    title="HEAPr",
    summary="prunes neurons of experts over all layers, to second order of the loss",
    paper="2509.22299",
    level="model",
    branch="pruning",
    rows=(Row(table=TRANSFORMS, kind=Heapr),),
    moves=("loss", "FLOPs", "bytes", "memory"),
    claim=(
        "Of a small language model half of the neurons go, and the loss rises by less than by "
        "activation norms and at most 0.3 of what it does by chance; the parameters left are 3 H "
        "times the widths, and ratio 0 changes no bit."
    ),
    departs=(
        "One pass over the text measures both means, since (g w)^2 needs no matrix. Written from "
        "the equations alone. An expert that the text does not show stays; unseen=drop prunes it "
        "first. The rise is 0.82 of that by activation norms here (one model), where at most 0.8 "
        "was looked for."
    ),
)
