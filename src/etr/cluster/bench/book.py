"""The results of the benchmark, by row of the page and seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from etr.cluster.bench.plan import EMULATED, ROWS, BenchConfig, TextKind, nodes_of
from etr.report.statistics import mean, t_interval

Timing = dict[str, Any]
BySeed = dict[int, float]


class Book:
    """The results, by row.

    Args:
        config: what was planned.
        results: of `etr.cluster.bench.run.results`.
    """

    def __init__(self, config: BenchConfig, results: dict[str, Any]) -> None:
        self.config, self.curves = config, results["curves"]
        self.trained: dict[str, Any] = results["trained"]
        self.timed: dict[tuple[str, str, str, str, int], list[Timing]] = {}
        for timed in results["timed"]:
            run = timed["run"]
            key = (timed["shape"], run["text"], timed["variant"], timed["compute"], run["seed"])
            self.timed.setdefault(key, []).append(timed)

    def rows(
        self, shape: str, text: TextKind, names: Iterable[str] = ROWS, compute: str = EMULATED
    ) -> list[MeasuredRow]:
        """The rows of which every seed is there."""
        rows = [MeasuredRow(self, shape, text, name, compute) for name in names]
        return [row for row in rows if len(row.seconds()) == len(self.config.seeds)]


@dataclass(frozen=True)
class MeasuredRow:
    """What was measured of a row on one shape and text, by seed."""

    book: Book
    shape: str
    text: TextKind
    variant: str
    compute: str = EMULATED

    @property
    def title(self) -> str:
        """As the tables show it."""
        return ROWS[self.variant].title

    @property
    def baseline(self) -> MeasuredRow:
        """The row that this one is compared with."""
        return replace(self, variant="baseline")

    def timings(self) -> dict[int, list[Timing]]:
        """Rounds of each seed that has any."""
        key, timed = (self.shape, self.text, self.variant, self.compute), self.book.timed
        return {seed: timed[*key, seed] for seed in self.book.config.seeds if (*key, seed) in timed}

    def seconds(self) -> BySeed:
        """Median step time."""
        return {
            seed: statistics.median(t for one in rounds for t in one["seconds"])
            for seed, rounds in self.timings().items()
        }

    def bytes_between_nodes(self) -> BySeed:
        """Bytes of all ranks in a forward pass, mean over rounds."""
        return {
            seed: mean([one["bytes_between_nodes"] for one in rounds])
            for seed, rounds in self.timings().items()
        }

    def trained(self, key: str) -> dict[int, Any]:
        """A number of the training run."""
        config, row = self.book.config, (self.shape, self.text, self.variant)
        found = {s: self.book.trained.get(config.run_of(*row, s).name) for s in config.seeds}
        return {seed: run[key] for seed, run in found.items() if run is not None}

    def local_share(self, what: str = "kept") -> BySeed:
        """Share of kept (or `chosen`) pairs whose expert is on the token's node."""
        nodes = nodes_of(self.shape)
        return {seed: local_share(pairs, nodes) for seed, pairs in self.trained(what).items()}

    def kept_share(self) -> BySeed:
        """Kept pairs over chosen ones."""
        chosen = self.trained("chosen")
        return {s: _total(kept) / _total(chosen[s]) for s, kept in self.trained("kept").items()}

    def ratios(
        self, measure: Callable[[MeasuredRow], BySeed], base: MeasuredRow | None = None
    ) -> list[float]:
        """A measure over that of the baseline, or another row, of each seed that both have."""
        own, other = measure(self), measure(base or self.baseline)
        return [own[seed] / other[seed] for seed in own if seed in other]

    def loss_differences(self) -> list[float]:
        """Held-out loss less that of the baseline, of each seed that both have."""
        own, other = self.trained("val_loss"), self.baseline.trained("val_loss")
        return [own[seed] - other[seed] for seed in own if seed in other]


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


def with_interval(values: list[float], form: str = "{:.2f}") -> str:
    """Mean of paired values, with Student's 95 % interval where there are several."""
    if not values:
        return ""
    low, high = t_interval(values) or (None, None)
    between = "" if low is None else f" ({form.format(low)} to {form.format(high)})"
    return form.format(mean(values)) + between


def average(values: BySeed, form: str = "{:.2f}") -> str:
    """Mean over seeds."""
    return form.format(mean(list(values.values()))) if values else ""
