"""What stands in the cells of the page's tables."""

from __future__ import annotations

from etr.cluster.bench.book import BenchCell, Book, loss_differences, ratios
from etr.report.statistics import mean, t_interval


def ratio(own: dict[int, float], base: dict[int, float]) -> str:
    """Mean ratio with its interval."""
    return with_interval(ratios(own, base), "{:.2f}")


def loss_cell(book: Book, cell: BenchCell, base: BenchCell) -> str:
    """Held-out loss less that of another row, with its interval."""
    return with_interval(loss_differences(book, cell, base), "{:+.3f}")


def with_interval(values: list[float], form: str) -> str:
    """Mean of paired values, with Student's 95 % interval where there are several."""
    if not values:
        return ""
    interval = t_interval(values)
    text = form.format(mean(values))
    if interval is None:
        return text
    return f"{text} ({form.format(interval[0])} to {form.format(interval[1])})"


def average(values: dict[int, float]) -> str:
    """Mean over seeds."""
    return f"{mean(list(values.values())):.2f}" if values else ""
