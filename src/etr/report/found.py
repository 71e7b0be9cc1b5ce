"""Which runs a figure shows, where it shows runs one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from etr.report.observations import Diagnostics
from etr.report.results import Results, Row

T = TypeVar("T")
MOST_RUNS = 24
"""Runs that a figure with panels shows; more would make a page that nobody scrolls."""


@dataclass(frozen=True, kw_only=True)
class Found(Generic[T]):
    """What a figure shows of one run."""

    name: str
    """The variant, with the seed where several seeds are shown."""
    row: Row
    """The run."""
    value: T
    """What was asked for."""


def first_of_each(results: Results, get: Callable[[Row], T | None]) -> list[Found[T]]:
    """The first seed of each variant that has it."""
    found = []
    for name in results.names:
        for row in results.of(name):
            if (value := get(row)) is not None:
                found.append(Found(name=name, row=row, value=value))
                break
    return found


def every_run(results: Results, get: Callable[[Row], T | None]) -> list[Found[T]]:
    """Every run that has it; the seed is in the name where its variant has several."""
    return [
        Found(
            name=name if len(results.of(name)) == 1 else f"{name}, seed {row.seed}",
            row=row,
            value=value,
        )
        for name in results.names
        for row in results.of(name)
        if (value := get(row)) is not None
    ]


def last_diagnostics(row: Row, has: Callable[[Diagnostics], T | None]) -> T | None:
    """The newest diagnostics that hold what is asked for."""
    rows = row.metrics.diagnostics if row.metrics else ()
    return next((found for d in reversed(rows) if (found := has(d)) is not None), None)


def too_many(found: Sequence[Any], most: int = MOST_RUNS) -> str:
    """A sentence for the caption where runs are left out."""
    return f" The first {most} of {len(found)} runs." if len(found) > most else ""
