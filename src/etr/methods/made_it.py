"""MADE-IT: experts of a stream of fine-tuned models, merged where they are alike (2604.22464)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors
from etr.model.bits import num_matrices
from etr.model.experts import EXPERTS, OfExperts, Values, lists_of, matrices_of, rebuilt
from etr.model.transform import SHARED, Stats
from etr.moe.collector import Collected
from etr.moe.config import MoEConfig
from etr.moe.experts.low_rank import LowRank
from etr.moe.experts.runs import text_of
from etr.moe.layer import MoE
from etr.moe.routers import ROUTERS, Projection


class Factors(NamedTuple):
    """A matrix [O, I] of low rank: orthonormal columns [O, R], values [R], orthonormal rows."""

    left: Tensor
    values: Tensor
    right: Tensor

    def whole(self) -> Tensor:
        """The matrix."""
        return (self.left * self.values) @ self.right


Expert = tuple[Factors, ...]
"""Of each of its matrices."""


def truncated(matrix: Tensor, rank: int) -> Factors:
    """The nearest matrix of a rank."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Factors(left[:, :rank], values[:rank], right[:rank])


def affinity(first: Expert, second: Expert) -> float:
    """How far the outputs and inputs of two experts overlap, in [0, 1], mean over matrices.

    Of each side the mean squared cosine of the principal angles.
    """
    sides = [
        float(a.square().sum()) / len(one.values)
        for one, other in zip(first, second, strict=True)
        for a in (one.left.T @ other.left, one.right @ other.right.T)
    ]
    return sum(sides) / len(sides)


def merged(first: Expert, second: Expert, counts: tuple[int, int]) -> Expert:
    """The mean of two experts, weighed by the tasks of each, at the rank of the first."""
    n, m = counts
    return tuple(
        truncated((n * a.whole() + m * b.whole()) / (n + m), len(a.values))
        for a, b in zip(first, second, strict=True)
    )


class Stream:
    """Experts of the tasks that came so far.

    Args:
        beta: standard deviations over the mean of all affinities from which on experts are alike.
    """

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta
        self.experts: list[Expert] = []
        self.of: list[int] = []
        """Number of the expert of each task."""
        self.decisions: list[tuple[float, float]] = []
        """Of each task but the first its highest affinity, and the threshold."""
        self._seen: list[float] = []

    def take(self, expert: Expert) -> None:
        """The next task's expert: merged with the one most like it, or added.

        The list of affinities starts with chance and three times it, and its own join afterwards;
        what is not over twice chance is never alike.
        """
        chance = chance_of(expert)
        self._seen = self._seen or [chance, 3 * chance]
        found = [affinity(expert, other) for other in self.experts]
        if not found:
            self.put(expert, 0)
            return
        seen = torch.tensor(self._seen, dtype=torch.float64)
        threshold = max(float(seen.mean() + self.beta * seen.std()), 2 * chance)
        nearest = max(range(len(found)), key=found.__getitem__)
        self.decisions.append((found[nearest], threshold))
        self._seen += found
        self.put(expert, nearest if found[nearest] > threshold else len(found))

    def put(self, expert: Expert, number: int) -> None:
        """The next task's expert becomes part of one, or the next one."""
        if number == len(self.experts):
            self.experts.append(expert)
        else:
            counts = self.of.count(number), 1
            self.experts[number] = merged(self.experts[number], expert, counts)
        self.of.append(number)


def chance_of(expert: Expert) -> float:
    """Affinity of unrelated experts, on average: rank over size, mean over sides and matrices."""
    sides = [
        len(one.values) / size for one in expert for size in (len(one.left), one.right.shape[1])
    ]
    return sum(sides) / len(sides)


@dataclass(frozen=True, kw_only=True)
class MadeIt(OfExperts):
    """Makes of a base and fine-tuned versions of it, its experts, a few low-rank differences.

    Task after task comes as it is numbered. Where its difference's outputs and inputs overlap with
    those of an earlier one by more than is usual so far, both become one. A token goes to the task
    whose input directions hold most of it; from the layer with most experts on, layers agree on a
    task.
    """

    name = "made_it"
    summary = "fine-tuned versions as low-rank experts, alike ones merged, and a router not learned"

    base: int = 0
    """Expert that the others were tuned from; every token gets it."""
    share: float = 0.1
    """Rank of a difference, as a share of the shorter side of its matrices."""
    beta: float = 1.0
    """Standard deviations over the mean of all affinities so far from which on experts merge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base < 0:
            raise ValueError(f"base={self.base} must be at least 0")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be over 0 and up to 1")
        if self.protect:
            raise ValueError(f"protect={self.protect!r}: every expert becomes a difference")

    def changes_function(self) -> str | None:
        return "experts are low-rank differences, and tokens go to the nearest"

    def rank(self, layer: MoEConfig) -> int:
        """Of each difference, at least 1."""
        return max(1, int(self.share * min(layer.hidden_size, layer.intermediate_size) + 1e-6))

    def inspect(self, layer: Collected, stats: Stats) -> Stats:
        assert isinstance(layer, MoE)
        OfExperts.check(self, None, [layer.config])
        values = {n: value.detach() for part in layer.bank.parts for n, value in part.weights()}
        stream = Stream(self.beta)
        for expert in self._tasks(values, self.rank(layer.config)):
            stream.take(expert)
        decisions = torch.tensor(stream.decisions, dtype=torch.float64).view(-1, 2)
        return {"of": torch.tensor(stream.of), "decisions": decisions}

    def _tasks(self, values: Values, rank: int) -> Iterator[Expert]:
        """The experts but for the base, as differences from it."""
        found = matrices_of(values)
        for number in range(len(values["down_proj"])):
            if number != self.base:
                yield tuple(truncated(m[number] - m[self.base], rank) for m in found.values())

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        of: list[list[int]] = [one["of"].tolist() for one in stats]
        counts = [len(set(numbers)) for numbers in of]
        return {
            "of": of,
            "anchor": counts.index(max(counts)),
            "affinity": [one["decisions"][:, 0].tolist() for one in stats],
            "threshold": [one["decisions"][:, 1].tolist() for one in stats],
        }

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        counts = " + ".join(str(len(set(numbers))) for numbers in plan["of"])
        return f"{len(plan['of'][0])} tasks become {counts} experts; layer {plan['anchor']} decides"

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        anchor = plan.get("anchor")
        if type(anchor) is not int or not 0 <= anchor < len(layers):
            raise ValueError(f"the plan's anchor={anchor!r} must be a layer below {len(layers)}")
        for place, (of, layer) in enumerate(zip(lists_of(plan, "of", layers), layers, strict=True)):
            if layer.expert_bias:
                raise ValueError("expert_bias=True: experts with biases are not taken")
            if layer.num_experts > 1 and self.base >= layer.num_experts:
                raise ValueError(
                    f"base={self.base} is not an expert of layer {place}, which has "
                    f"{layer.num_experts}"
                )
            fine = isinstance(of, list) and all(type(number) is int for number in of)
            new = [number for i, number in enumerate(of) if number not in of[:i]] if fine else []
            if not fine or len(of) != layer.num_experts - 1 or new != list(range(len(new))):
                raise ValueError(
                    f"the plan's 'of' of layer {place} must name the expert of each of "
                    f"{layer.num_experts - 1} tasks, new ones numbered in order: {of!r}"
                )

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        of = plan["of"][place]
        if not of:
            return tensors
        rank = max(1, int(self.share * min(tensors["experts.down_proj"].shape[1:]) + 1e-6))
        kept = {k: t for k, t in tensors.items() if k.startswith((EXPERTS, *SHARED))}
        found = rebuilt(
            kept,
            lambda values: self._stored(values, of, rank),
            lambda values: _shapes(values, max(of) + 1, rank),
        )
        basis = found.pop(f"{EXPERTS}basis")
        return {**found, "router.basis": replace(basis, name="router.basis")}

    def _stored(self, values: Values, of: Sequence[int], rank: int) -> Values:
        """Base and differences as `LowRank` stores them, and the router's directions."""
        stream = Stream()
        for number, expert in zip(of, self._tasks(values, rank), strict=True):
            stream.put(expert, number)
        found = {name: value[self.base, None] for name, value in values.items()}
        like, names = values["down_proj"], list(matrices_of(values))
        for name, each in zip(names, zip(*stream.experts, strict=True), strict=True):
            root = [one.values.sqrt() for one in each]
            left = [one.left * r for one, r in zip(each, root, strict=True)]
            right = [r[:, None] * one.right for one, r in zip(each, root, strict=True)]
            found[f"{name}_left"] = torch.cat(left, dim=1).to(like.dtype)
            found[f"{name}_right"] = torch.cat(right).to(like.dtype)
        readers = [torch.stack([m.right for m in expert[:-1]]) for expert in stream.experts]
        return {**found, "basis": torch.stack(readers).to(_basis_dtype(like))}

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        numbers = plan["of"][place]
        if not numbers:
            return layer
        of = "+".join(map(str, numbers)) if max(numbers) + 1 < len(numbers) else ""
        router = Projection(
            rank=self.rank(layer),
            sets=num_matrices(layer) - 1,
            of=of,
            follow=place >= plan["anchor"],
        )
        return replace(
            layer,
            num_experts=len(numbers),
            top_k=1,
            router=router,
            experts=LowRank(ranks=text_of([self.rank(layer)] * (max(numbers) + 1)), of=of),
            capacity="none",
            rank_by=None,
            normalize=None,
            losses="",
            routed_scale=1.0,
        )


def _shapes(values: Values, count: int, rank: int) -> Values:
    """Tensors of the shapes of `_stored`, for so many experts."""
    found, matrices = {n: value[:1] for n, value in values.items()}, matrices_of(values)
    for name, (_, rows, columns) in ((n, m.shape) for n, m in matrices.items()):
        found[f"{name}_left"] = values["down_proj"].new_empty(rows, count * rank)
        found[f"{name}_right"] = values["down_proj"].new_empty(count * rank, columns)
    sizes = (count, len(matrices) - 1, rank, values["down_proj"].shape[1])
    like = values["down_proj"]
    return {**found, "basis": like.new_empty(sizes, dtype=_basis_dtype(like))}


def _basis_dtype(like: Tensor) -> torch.dtype:
    """Of the router's directions, which half precision would tilt."""
    return torch.promote_types(like.dtype, torch.float32)


CARD = Card(
    name="made_it",
    title="MADE-IT",
    summary="low-rank experts of fine-tuned versions, alike ones merged, routed by projection",
    paper=Projection.paper,
    level="model",
    branch="merging",
    rows=(Row(table=TRANSFORMS, kind=MadeIt), Row(table=ROUTERS, kind=Projection)),
    moves=("loss", "bytes", "memory"),
    claim=(
        "Of 6 tasks of which two pairs are one task tuned twice 4 experts are made in any of 5 "
        "orders, and 0.95 of the tokens or more go to their task's; one task at full rank is the "
        "tuned model within 1e-6."
    ),
    departs=(
        "The three matrices of a feed-forward are merged and routed as one, by what reads tokens, "
        "and attention is the base's. The rules of the threshold and the anchor are this library's "
        "own, since the paper's are known in words alone; layers before the anchor choose by "
        "themselves. Takes a model that has base and tuned versions as its experts."
    ),
)
