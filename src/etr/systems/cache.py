"""A fast memory that holds a few experts: who leaves when another must come in.

A replay of a trace (`etr.systems.replay`) and a model whose experts do not fit (`etr.hf.offload`)
go through the same `Memory`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from torch import Tensor

from etr.systems.plan import Demand
from etr.table import Table

Forecast = Callable[[Demand, Tensor], Tensor]
"""A trace and ids of its tokens [N] to the experts that they should use, int64 [L, N, K].

Of a token's own choices it may look at those in earlier layers."""


class FastMemory:
    """What a policy knows while a memory is used; `Memory` holds the experts themselves.

    Experts are numbers; where layers share a memory, ``layer * num_experts + expert``.
    """

    computes_elsewhere: ClassVar[bool] = False
    """Whether an expert that is used and not there is computed where its weights are, and does not
    come in."""
    tokens: Mapping[int, int] = MappingProxyType({})
    """Experts that the step at hand will use, in order, and how many tokens each."""
    num_layers = num_experts = 1

    def shared_by(self, num_layers: int, num_experts: int) -> None:
        """Told before the first step: layers that share the memory, and experts of each."""
        self.num_layers, self.num_experts = num_layers, num_experts

    def first(self, size: int) -> Iterable[int]:
        """Experts that are there before anything is used; they are no loads.

        Args:
            size: experts that the memory holds.
        """
        return ()

    def prepare(self, step: int, experts: Sequence[int]) -> Iterable[int]:
        """Experts to bring in before a step, in order.

        Args:
            step: a token in a layer, from 0; of a model that fills blocks, a step of the block.
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
    predicts: ClassVar[bool] = False
    """Whether it predicts what will be used, and must `learn` how."""
    predicts_prompts: ClassVar[bool] = False
    """Whether it does so by the tokens alone, before a model runs, so that batches can be made."""
    prefetches: ClassVar[bool] = False
    """Whether it may bring in experts before they are asked for, and so have hits over the bound
    of those who load misses alone."""

    def start(self, uses: Sequence[int], expected: Sequence[Sequence[int]] = ()) -> FastMemory:
        """An empty memory.

        Args:
            uses: every expert that will be used, in order; for those who foresee.
            expected: experts that each step is predicted to use; for those who predict.
        """
        raise NotImplementedError

    def learn(self, past: Demand, tokens: Tensor) -> Forecast:
        """Learn to predict from a trace with choices.

        Args:
            past: of another text than what will be predicted.
            tokens: ids of its tokens, int64 [N].
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class LeastRecentlyUsed(Cache):
    """Whoever was not used for longest leaves."""

    name = "lru"
    summary = "the least recently used expert leaves"

    def start(self, uses: Sequence[int], expected: Sequence[Sequence[int]] = ()) -> FastMemory:
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
class LeastFrequentlyUsed(Cache):
    """Whoever was used least often so far leaves, of several the one used longest ago."""

    name = "lfu"
    summary = "the least often used expert leaves"

    def start(self, uses: Sequence[int], expected: Sequence[Sequence[int]] = ()) -> FastMemory:
        return _Frequent()


class _Frequent(FastMemory):
    def __init__(self) -> None:
        self._used: dict[int, tuple[int, int]] = {}  # how often, and when last

    def used(self, place: int, expert: int) -> None:
        self._used[expert] = self._used.get(expert, (0, 0))[0] + 1, place

    def leaves(self, held: Collection[int]) -> int:
        return min(held, key=lambda expert: (*self._used.get(expert, (0, -1)), expert))


@dataclass(frozen=True, kw_only=True)
class Oracle(Cache):
    """Whoever is used again last leaves (Belady): no policy that loads each miss has more hits."""

    name = "oracle"
    summary = "the expert whose next use is farthest leaves (Belady): a bound"
    foresees = True

    def start(self, uses: Sequence[int], expected: Sequence[Sequence[int]] = ()) -> FastMemory:
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


CACHES: Table[Cache] = Table("cache", (LeastRecentlyUsed, LeastFrequentlyUsed, Oracle))
"""Policies by name."""


class Memory:
    """A fast memory of a few experts that a policy looks after, empty at first, and its counters.

    Args:
        policy: who leaves.
        size: experts that it holds.
        move: called with an expert that comes in and the one that makes room for it, or None.
    """

    def __init__(
        self,
        policy: FastMemory,
        size: int,
        move: Callable[[int, int | None], None] = lambda comes, leaves: None,
    ) -> None:
        self._policy, self._size, self._move = policy, size, move
        self.step = 0
        """Number of the next step; a model that fills blocks counts anew in each."""
        self.held: set[int] = set()
        """Experts that are there."""
        for expert in policy.first(size):
            move(expert, None)
            self.held.add(expert)
        self.uses = self.hits = self.loads = 0

    def count_from(self, step: int) -> None:
        """Say which step of a block comes; negative: none does, and the number counts on."""
        if step >= 0:
            self.step = step

    def begin(self, tokens: Mapping[int, int]) -> None:
        """A step that will use some experts, for so many tokens each: the policy may bring in any.

        Args:
            tokens: experts in the order in which they will be used, and tokens of each.
        """
        self._policy.tokens = tokens
        for expert in self._policy.prepare(self.step, list(tokens)):
            self._bring(expert)
        self.step += 1

    def use(self, expert: int) -> None:
        """An expert is used: it is there afterwards, until another needs its place.

        Unless the policy has it computed elsewhere, where it is not there.
        """
        self.hits += expert in self.held
        if not self._policy.computes_elsewhere:
            self._bring(expert)
        self._policy.used(self.uses, expert)
        self.uses += 1

    def _bring(self, expert: int) -> None:
        if expert in self.held:
            return
        leaves = self._policy.leaves(self.held) if len(self.held) >= self._size else None
        if leaves is not None:
            self.held.remove(leaves)
        self._move(expert, leaves)
        self.held.add(expert)
        self.loads += 1


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a memory did on a trace.

    Args:
        uses: experts that tokens used, one for each choice.
        hits: of them, those that were in memory.
        loads: experts brought in: every miss, and what a policy brought in beforehand; only the
            latter where a miss is computed elsewhere.
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

    def seconds(self, expert_bytes: int, bandwidth: float, latency: float = 0.0) -> float:
        """Time for what was brought in, one expert after the other.

        Args:
            expert_bytes: of each expert.
            bandwidth: of the way from the slow tier to the fast one, bytes per second.
            latency: before the first byte of each expert, seconds.
        """
        return self.loads * (latency + expert_bytes / bandwidth)

    @classmethod
    def of(cls, memories: Iterable[Memory]) -> Replayed:
        """What several memories did together."""
        found = list(memories)
        return cls(
            uses=sum(memory.uses for memory in found),
            hits=sum(memory.hits for memory in found),
            loads=sum(memory.loads for memory in found),
        )
