"""A fast memory that holds a few experts: who leaves when another must come in, replayed.

A replay touches no value of a model: it walks the choices of a trace in decoding order, token after
token and in each token layer after layer, and counts which experts were there already. A model
whose experts do not fit (`etr.hf.offload`) goes through the same `Memory`.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
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


def replay(
    choices: Tensor,
    cache: Cache,
    size: int,
    *,
    num_experts: int,
    shared: bool = False,
    forward: Tensor | None = None,
    expected: Tensor | None = None,
) -> Replayed:
    """Use the experts of a trace in decoding order, from an empty memory.

    Args:
        choices: int64 [L, N, K], negative where a token has fewer.
        cache: who leaves.
        size: experts that a memory holds.
        num_experts: E of each layer.
        shared: one memory for all layers, and not one each.
        forward: number of the forward pass that each token is part of, int64 [N], equal ones side
            by side; a pass uses each of its experts once. None: one for each token.
        expected: what was predicted, int64 [L, N, K'], for a policy that predicts; not with
            `forward`.
    Raises:
        ValueError: wrong sizes, an expert that there is not, or no prediction for who needs one.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1, experts")
    _check(choices, num_experts, "choices")
    steps = _steps(choices, num_experts, shared, forward)
    guesses: list[list[dict[int, int]]] = [[] for _ in steps]
    if cache.predicts:
        if expected is None or forward is not None:
            raise ValueError(
                f"cache {cache.name!r} goes by predicted choices of each token; give expected, and "
                "no forward"
            )
        _check(expected, num_experts, "expected")
        guesses = _steps(expected, num_experts, shared, None)
    memories = []
    for memory_steps, guess in zip(steps, guesses, strict=True):
        flat = [expert for step in memory_steps for expert in step]
        policy = cache.start(flat, [list(step) for step in guess])
        policy.shared_by(len(choices) if shared else 1, num_experts)
        memory = Memory(policy, size)
        for step in memory_steps:
            memory.begin(step)
            for expert in step:
                memory.use(expert)
        memories.append(memory)
    return Replayed.of(memories)


def _check(choices: Tensor, num_experts: int, name: str) -> None:
    if choices.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(choices.shape)}; it must be [L, N, K]")
    if choices.numel() and choices.max() >= num_experts:
        raise ValueError(f"{name} holds {int(choices.max())}; num_experts={num_experts}")


def _steps(
    choices: Tensor, num_experts: int, shared: bool, forward: Tensor | None
) -> list[list[dict[int, int]]]:
    """Experts of every step and their tokens, for every memory."""
    parts = [choices[:, i : i + 1] for i in range(choices.shape[1])]
    if forward is not None:
        lengths = torch.unique_consecutive(forward, return_counts=True)[1].tolist()
        parts = list(choices.split(lengths, 1)) if lengths else []
    # [part][layer] -> experts in the order of first use, and how many tokens
    found = [[_counted(layer) for layer in part.flatten(1).tolist()] for part in parts]
    if not shared:
        return [[part[layer] for part in found] for layer in range(len(choices))]
    first = range(0, len(choices) * num_experts, num_experts)
    return [
        [
            {expert + n: count for expert, count in one.items()}
            for part in found
            for n, one in zip(first, part, strict=True)
        ]
    ]


def _counted(experts: list[int]) -> dict[int, int]:
    return Counter(expert for expert in experts if expert >= 0)
