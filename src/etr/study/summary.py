"""Rows of results as means over seeds, and their paired differences from a reference."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from etr.report.statistics import Estimate, crossed_estimate, estimate, mean

RunResult = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LossDifference:
    """Loss of a row less that of its reference, paired by seed and, where both have their losses,
    by held-out document."""

    mean: float
    """Mean over the seeds that both have."""
    seeds: int
    """Number of those seeds."""
    documents: int = 0
    """Number of documents that the interval covers too; 0 where it is over seeds alone."""
    estimate: Estimate | None = None
    """What interval and p-value are made from; None for one seed."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Student's 95 %, None for one seed."""
        return self.estimate.interval() if self.estimate else None

    @property
    def p_value(self) -> float | None:
        """Of Student's two-sided test that there is none; None for one seed."""
        return self.estimate.p_value() if self.estimate else None

    def widened(self, error: float) -> LossDifference:
        """The same with a further standard error, known well, that is independent of it."""
        return replace(self, estimate=self.estimate and self.estimate.widened(error))

    @property
    def verdict(self) -> str:
        """lower, higher, or that it cannot be said."""
        if self.interval is None:
            return "one seed"
        low, high = self.interval
        return "lower" if high < 0 else "higher" if low > 0 else "cannot be told apart"

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.mean:+.4f} (one seed)"
        return f"{self.mean:+.4f} ({self.interval[0]:+.4f} to {self.interval[1]:+.4f})"


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One row of a block over its seeds."""

    name: str
    results: tuple[RunResult, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return int(self.results[0]["steps"])

    @property
    def seeds(self) -> list[int]:
        """Seeds, in order."""
        return [result["run"]["seed"] for result in self.results]

    def losses(self, mode: str = "served") -> dict[int, float]:
        """Held-out loss by seed: `served`, `threshold` or `dropless`; seeds without it left out."""
        found = {}
        for result in self.results:
            final = result["final"]
            if mode == "served":
                found[result["run"]["seed"]] = float(final["served_loss"])
            elif mode in final:
                found[result["run"]["seed"]] = float(final[mode]["loss"])
        return found

    def mean_loss(self, mode: str = "served") -> float | None:
        """Mean over seeds."""
        values = list(self.losses(mode).values())
        return mean(values) if values else None

    def average(self, key: str) -> float:
        """Mean over seeds of a number at the top of a result."""
        return statistics.fmean(float(result[key]) for result in self.results)

    def drop_rate(self) -> float:
        """Share of what tokens asked for in training and no expert kept; a mean over all steps."""
        return statistics.fmean(
            1 - result["kept_per_token"] / result["config"]["model"]["routing"]["top_k"]
            for result in self.results
        )

    def flops_of_a_token(self) -> float:
        """Expert FLOPs of a token, forward and backward pass."""
        return statistics.fmean(
            result["expert_flops"] / result["steps"] / result["tokens_per_step"]
            for result in self.results
        )

    def final(self, mode: str, key: str) -> float | None:
        """Mean over seeds of a number of the last evaluation in a mode."""
        values = [
            float(result["final"][mode][key])
            for result in self.results
            if mode in result["final"] and result["final"][mode][key] is not None
        ]
        return statistics.fmean(values) if values else None

    def measured(self, key: str) -> float | None:
        """Mean over seeds and layers of a diagnostic; None where it was not measured."""
        values = [
            float(layer[key])
            for result in self.results
            for layer in result.get("measures", {}).get("layers", [])
            if layer.get(key) is not None
        ]
        return statistics.fmean(values) if values else None


def rows_of(results: Sequence[RunResult]) -> list[StudyRow]:
    """Group results by row and steps, in the order in which rows first appear."""
    groups: dict[tuple[str, int], list[RunResult]] = {}
    for result in results:
        name = result["run"]["variant"].partition("/")[0].partition(":")[0].partition("=")[0]
        groups.setdefault((name, result["steps"]), []).append(result)
    return [
        StudyRow(name=name, results=tuple(sorted(group, key=lambda r: r["run"]["seed"])))
        for (name, _), group in groups.items()
    ]


def difference(row: StudyRow, reference: StudyRow, mode: str = "served") -> LossDifference | None:
    """Paired difference of losses; None where no seed is shared.

    Args:
        mode: of `row`; the reference is always taken as it is served.
    """
    own, other = row.losses(mode), reference.losses()
    pairs = {seed: own[seed] - other[seed] for seed in own if seed in other}
    if not pairs:
        return None
    found = _over_documents(row, reference, list(pairs)) if mode == "served" else None
    over, documents = found or (estimate(list(pairs.values())), 0)
    return LossDifference(
        mean=mean(list(pairs.values())),
        seeds=len(pairs),
        documents=documents,
        estimate=over,
    )


def _over_documents(
    row: StudyRow, reference: StudyRow, seeds: Sequence[int]
) -> tuple[Estimate, int] | None:
    """With the number of documents; None where a result lacks them, or for one seed."""
    own, other = (
        {result["run"]["seed"]: result.get("documents") or {} for result in one.results}
        for one in (row, reference)
    )
    pairs = [(own[seed], other[seed]) for seed in seeds]
    if not all(a and b and a["tokens"] == b["tokens"] for a, b in pairs):
        return None
    first = pairs[0][0]
    less = [[x - y for x, y in zip(a["loss"], b["loss"], strict=True)] for a, b in pairs]
    found = crossed_estimate(less, first["tokens"], first["domain"])
    return None if found is None else (found, len(first["tokens"]))


def resolution(rows: Sequence[StudyRow], reference: StudyRow) -> float | None:
    """Median half-width of the intervals: the smallest difference that could have been seen."""
    widths = []
    for row in rows:
        found = difference(row, reference)
        if row.name != reference.name and found is not None and found.interval is not None:
            widths.append((found.interval[1] - found.interval[0]) / 2)
    return statistics.median(widths) if widths else None
