"""A fast memory that holds a few experts: who leaves when another must come in, replayed.

A replay touches no value of a model: it walks the choices of a trace in decoding order, token after
token and in each token layer after layer, and counts which experts were there already.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from etr.table import Table


class FastMemory:
    """What a policy knows while a memory is used; the replay holds the experts themselves.

    Experts are numbers; where layers share a memory, ``layer * num_experts + expert``.
    """

    def prepare(self, step: int, experts: Sequence[int]) -> Iterable[int]:
        """Experts to bring in before a step, in order.

        Args:
            step: a token in a layer, from 0.
            experts: that the step will use.
        """
        return ()

    def used(self, place: int, expert: int) -> None:
        """An expert is used; it is in memory now.

        Args:
            place: number of the use, from 0.
        """

    def leaves(self, held: Collection[int]) -> int:
        """The expert that makes room, one of those held."""
        raise NotImplementedError


class Cache:
    """A frozen config of a policy; one row of `CACHES`."""

    name: ClassVar[str]
    """In commands."""
    summary: ClassVar[str]
    """One line for `etr cache --help`."""
    foresees: ClassVar[bool] = False
    """Whether it knows what will be used: a bound, which no policy of a running model reaches."""

    def start(self, uses: Sequence[int]) -> FastMemory:
        """An empty memory.

        Args:
            uses: every expert that will be used, in order; for those who foresee.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LeastRecentlyUsed(Cache):
    """Whoever was not used for longest leaves."""

    name = "lru"
    summary = "the least recently used expert leaves"

    def start(self, uses: Sequence[int]) -> FastMemory:
        return _Recent()


class _Recent(FastMemory):
    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()  # the one used longest ago first

    def used(self, place: int, expert: int) -> None:
        self._order[expert] = None
        self._order.move_to_end(expert)

    def leaves(self, held: Collection[int]) -> int:
        found = next(expert for expert in self._order if expert in held)
        del self._order[found]
        return found


@dataclass(frozen=True, kw_only=True)
class Oracle(Cache):
    """Whoever is used again last leaves (Belady): no policy that loads each miss has more hits."""

    name = "oracle"
    summary = "the expert whose next use is farthest leaves (Belady): a bound"
    foresees = True

    def start(self, uses: Sequence[int]) -> FastMemory:
        return _Foreseen(uses)


class _Foreseen(FastMemory):
    def __init__(self, uses: Sequence[int]) -> None:
        self._following: list[float] = [math.inf] * len(uses)
        later: dict[int, int] = {}
        for place in range(len(uses) - 1, -1, -1):
            self._following[place] = later.get(uses[place], math.inf)
            later[uses[place]] = place
        self._next: dict[int, float] = {}

    def used(self, place: int, expert: int) -> None:
        self._next[expert] = self._following[place]

    def leaves(self, held: Collection[int]) -> int:
        return min(held, key=lambda expert: (-self._next.get(expert, math.inf), expert))


CACHES: Table[Cache] = Table("cache", (LeastRecentlyUsed, Oracle))
"""Policies by name."""


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a memory did on a trace.

    Args:
        uses: experts that tokens used, one for each choice.
        hits: of them, those that were in memory.
        loads: experts brought in: every miss, and what a policy brought in beforehand.
    """

    uses: int
    hits: int
    loads: int

    @property
    def hit_rate(self) -> float:
        """In [0, 1]; NaN where nothing was used."""
        return self.hits / self.uses if self.uses else math.nan

    def bytes_moved(self, expert_bytes: int) -> int:
        """Bytes brought in, with experts of that size."""
        return self.loads * expert_bytes


def replay(
    choices: Tensor, cache: Cache, size: int, *, num_experts: int, shared: bool = False
) -> Replayed:
    """Use the experts of a trace in decoding order, from an empty memory.

    Args:
        choices: int64 [L, N, K], negative where a token has fewer.
        cache: who leaves.
        size: experts that a memory holds.
        num_experts: E of each layer.
        shared: one memory for all layers, and not one each.
    Raises:
        ValueError: wrong sizes, or an expert that there is not.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1, experts")
    if choices.ndim != 3:
        raise ValueError(f"choices has shape {tuple(choices.shape)}; it must be [L, N, K]")
    if choices.numel() and choices.max() >= num_experts:
        raise ValueError(f"choices holds {int(choices.max())}; num_experts={num_experts}")
    if shared:
        first = (torch.arange(len(choices)) * num_experts)[:, None, None]
        numbered = torch.where(choices < 0, choices, choices + first)
        memories = [numbered.transpose(0, 1).flatten(0, 1)]
    else:
        memories = list(choices)
    done = [_replay(steps.tolist(), cache, size) for steps in memories]
    return Replayed(
        uses=sum(found.uses for found in done),
        hits=sum(found.hits for found in done),
        loads=sum(found.loads for found in done),
    )


def _replay(steps: list[list[int]], cache: Cache, size: int) -> Replayed:
    """One memory."""
    steps = [[expert for expert in step if expert >= 0] for step in steps]
    memory = cache.start([expert for step in steps for expert in step])
    held: set[int] = set()
    uses = hits = loads = 0

    def bring(expert: int) -> None:
        nonlocal loads
        if expert in held:
            return
        if len(held) >= size:
            held.remove(memory.leaves(held))
        held.add(expert)
        loads += 1

    for number, step in enumerate(steps):
        for expert in memory.prepare(number, step):
            bring(expert)
        for expert in step:
            hits += expert in held
            bring(expert)
            memory.used(uses, expert)
            uses += 1
    return Replayed(uses=uses, hits=hits, loads=loads)
