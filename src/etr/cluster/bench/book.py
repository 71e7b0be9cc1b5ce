"""The results of the benchmark, by row and seed."""

from __future__ import annotations

import statistics
from typing import Any

from etr.cluster.bench.plan import BenchConfig, TextKind, nodes_of
from etr.report.statistics import mean

Timing = dict[str, Any]
BenchCell = tuple[str, TextKind, str]
"""Shape, text, variant."""


class Book:
    """The results, by row.

    Args:
        config: what was planned.
        results: of `etr.cluster.bench.run.results`.
    """

    def __init__(self, config: BenchConfig, results: dict[str, Any]) -> None:
        self.config, self.curves = config, results["curves"]
        self._trained = results["trained"]
        self._timed: dict[tuple[str, str, str, str, int], list[Timing]] = {}
        for timed in results["timed"]:
            run = timed["run"]
            key = (
                timed["shape"],
                run["text"],
                timed["variant"],
                timed["compute"],
                run["seed"],
            )
            self._timed.setdefault(key, []).append(timed)

    def timings(self, cell: BenchCell, compute: str, seed: int) -> list[Timing]:
        """Rounds of a row."""
        return self._timed.get((*cell, compute, seed), [])

    def seconds(self, cell: BenchCell, compute: str = "emulated") -> dict[int, float]:
        """Median step time by seed."""
        found = {s: self.timings(cell, compute, s) for s in self.config.seeds}
        return {
            seed: statistics.median(t for one in rounds for t in one["seconds"])
            for seed, rounds in found.items()
            if rounds
        }

    def counted(self, cell: BenchCell, key: str) -> dict[int, float]:
        """A counter of the emulated timing by seed."""
        found = {s: self.timings(cell, "emulated", s) for s in self.config.seeds}
        return {s: mean([r[key] for r in rounds]) for s, rounds in found.items() if rounds}

    def trained(self, cell: BenchCell, key: str) -> dict[int, Any]:
        """A number of the training run by seed."""
        names = {s: self.config.run_of(*cell, s).name for s in self.config.seeds}
        return {s: self._trained[n][key] for s, n in names.items() if n in self._trained}

    def local_share(self, cell: BenchCell, what: str = "kept") -> dict[int, float]:
        """Share of kept (or `chosen`) pairs whose expert is on the token's node, by seed."""
        counts = self.trained(cell, what)
        return {seed: local_share(found, nodes_of(cell[0])) for seed, found in counts.items()}

    def kept_share(self, cell: BenchCell) -> dict[int, float]:
        """Kept pairs over chosen ones by seed."""
        kept, chosen = self.trained(cell, "kept"), self.trained(cell, "chosen")
        return {seed: _total(kept[seed]) / _total(chosen[seed]) for seed in kept}

    def has(self, cell: BenchCell) -> bool:
        """Whether every seed of a row is there."""
        return len(self.seconds(cell)) == len(self.config.seeds)


def local_share(counts: list[list[int]], nodes: tuple[int, ...]) -> float:
    """Share of pairs whose expert is on the node of their rank.

    Args:
        counts: pairs of each rank (row) with each expert; ranks hold equal blocks of experts.
        nodes: node of each rank.
    """
    experts = len(counts[0])
    home = [nodes[expert * len(nodes) // experts] for expert in range(experts)]
    stay = sum(
        number
        for node, row in zip(nodes, counts, strict=True)
        for there, number in zip(home, row, strict=True)
        if there == node
    )
    return stay / _total(counts)


def _total(counts: list[list[int]]) -> int:
    return sum(map(sum, counts))


def ratios(own: dict[int, float], base: dict[int, float]) -> list[float]:
    """Ratio of each seed that both have."""
    return [own[seed] / base[seed] for seed in own if seed in base]


def loss_differences(book: Book, cell: BenchCell, base: BenchCell) -> list[float]:
    """Held-out loss of a row less that of another, of each seed that both have."""
    own, other = book.trained(cell, "val_loss"), book.trained(base, "val_loss")
    return [own[seed] - other[seed] for seed in own if seed in other]
