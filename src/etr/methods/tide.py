"""TIDE: which experts are in fast memory changes every few steps of a block (2605.20179)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from etr.methods.card import Card, Row
from etr.moe.checked import check_types
from etr.systems.cache import CACHES, Cache, FastMemory, Memory


@dataclass(frozen=True, kw_only=True)
class Tide(Cache):
    """In every so many-th step of a block, the experts with most of its tokens come in.

    As many of the others leave, the lowest first, before anything is computed. Between, whoever is
    there stays, and an expert that is not there is computed where its weights are. At first the
    lowest experts are there. A model that writes token by token has one block without end.
    """

    name = "tide"
    summary = "every few steps of a block, the experts with most of its tokens come in"
    prefetches = True

    every: int = 2
    """Steps of a block from one exchange to the next."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1, steps")

    def start(self, uses: Sequence[int], expected: Sequence[Sequence[int]] = ()) -> FastMemory:
        return _Exchanged(self.every)


class _Exchanged(FastMemory):
    computes_elsewhere = True

    def __init__(self, every: int) -> None:
        self._every = every

    def first(self, size: int) -> Iterable[int]:
        self._size, self._wanted = size, list(range(size))
        return self._wanted

    def prepare(self, step: int, experts: Sequence[int]) -> Iterable[int]:
        if step % self._every:
            return ()
        most_first = sorted(experts, key=lambda expert: (-self.tokens[expert], expert))
        self._wanted = most_first[: self._size]
        return self._wanted

    def leaves(self, held: Collection[int]) -> int:
        return min(expert for expert in held if expert not in self._wanted)


@dataclass(frozen=True, kw_only=True)
class Exchanges:
    """What an interval between exchanges comes to."""

    moves: int
    """Experts that came in."""
    missed: int
    """Pairs of a token and an expert that was not there."""

    def cost(self, move: float, miss: float) -> float:
        """In the units of what an expert costs that moves, and a pair that misses."""
        return self.moves * move + self.missed * miss


def exchanged(counts: Tensor, steps: Tensor, size: int, every: int) -> Exchanges:
    """Replay one layer's steps.

    Args:
        counts: tokens of each expert in each step, int64 [N, E].
        steps: number of each step in its block, int [N]; negative for a pass that fills none, whose
            number counts on.
        size: experts that are there.
        every: steps between exchanges.
    """
    memory, missed = Memory(Tide(every=every).start(()), size), 0
    for row, step in zip(counts.tolist(), steps.tolist(), strict=True):
        memory.count_from(step)
        tokens = {expert: count for expert, count in enumerate(row) if count}
        memory.begin(tokens)
        missed += sum(n for expert, n in tokens.items() if expert not in memory.held)
    return Exchanges(moves=memory.loads, missed=missed)


def best_interval(found: dict[int, Exchanges], *, move: float, miss: float) -> int:
    """The interval of least cost, of equal ones the shortest.

    Args:
        found: what each interval came to.
        move: cost of an expert that comes in.
        miss: cost of a pair of a token and an expert that is not there.
    """
    return min(sorted(found), key=lambda every: found[every].cost(move, miss))


CARD = Card(
    name="tide",
    title="TIDE",
    summary="experts in memory are exchanged every few steps of a block, by its tokens",
    paper="2605.20179",
    level="system",
    branch="offloading and caching",
    rows=(Row(table=CACHES, kind=Tide),),
    against="lru",
    moves=("bytes",),
    claim=(
        "Tokens are those of the whole model for every interval tau and every number C of experts "
        "held, and moves are those of a replay; C = E moves and misses nothing. Where a step's "
        "experts drift, moves fall and misses rise from tau = 1 to 2, 4 and 8."
    ),
    departs=(
        "Blocks of the text before are in a cache, so that a step counts its block alone; passes "
        "that put a prompt or a block there are steps more. Every block is exchanged "
        "at the interval, the first one too. `etr generate --offload` reads a missed expert for "
        "the step alone, in the place of computing it elsewhere. The interval is searched on "
        "measured moves and misses (`best_interval`), not by the paper's formula of drift. The "
        "model of `make dlm`, 16 of 32 experts held, moved 486, 397, 336 and 289 of them "
        "for tau = 1, 2, 4 and 8, and missed 0.028, 0.041, 0.065 and 0.152 of the pairs."
    ),
)
