"""What the benchmark aims at, and whether it is reached."""

from __future__ import annotations

from etr.cluster.bench.book import BenchCell, Book, loss_differences, ratios
from etr.cluster.bench.cells import with_interval
from etr.report.statistics import mean, t_interval
from etr.sheet import table

MOST_BYTES = {"own": 0.35, "mixed": 0.60}
"""Targets of bytes between nodes over the baseline's, by text."""
LEAST_LOCAL, MOST_VIOLATION = 0.70, 0.50
"""Targets of the locality loss alone: share of choices on the node, and MaxVio."""
NO_WORSE = 0.02
"""Nats; "no worse" is said only where the interval's upper end is below it."""


def targets_of(book: Book, shape: str) -> str:
    """Each target and whether it is met, for the published ETR and the default one."""
    lines = []
    for name in ("etr-published", "etr"):
        cells: list[BenchCell] = [(shape, "own", v) for v in (name, "baseline", "locmoe")]
        own, base, old = cells
        if not all(map(book.has, cells)):
            continue
        for what, limit, found in (
            ("step time / baseline", 0.50, ratios(book.seconds(own), book.seconds(base))),
            ("step time / LocMoE", 0.85, ratios(book.seconds(own), book.seconds(old))),
            (
                "bytes between nodes / baseline",
                MOST_BYTES["own"],
                ratios(
                    book.counted(own, "bytes_between_nodes"),
                    book.counted(base, "bytes_between_nodes"),
                ),
            ),
        ):
            value = mean(found)
            verdict = "met" if value <= limit else "missed"
            lines.append((f"`{name}`", what, f"{limit:.2f}", f"{value:.2f}", verdict))
        lines.append((f"`{name}`", "held-out loss", "no worse", *_verdict(book, own, base)))
    head = ("variant", "target", "at most", "measured", "verdict")
    return "\n" + table(head, lines) if lines else ""


def mixed_target(book: Book, shape: str) -> str:
    """Whether the published ETR sends few enough bytes on mixed text."""
    cells: list[BenchCell] = [(shape, "mixed", name) for name in ("etr-published", "baseline")]
    if not all(map(book.has, cells)):
        return ""
    own, base = (book.counted(cell, "bytes_between_nodes") for cell in cells)
    found = mean(ratios(own, base))
    limit = MOST_BYTES["mixed"]
    verdict = "met" if found <= limit else "missed"
    return (
        f"Bytes between nodes of published ETR over the baseline's: {found:.2f}; the target was "
        f"{limit:.2f} at most, {verdict}.\n"
    )


def _verdict(book: Book, cell: BenchCell, base: BenchCell) -> tuple[str, str]:
    found = loss_differences(book, cell, base)
    interval = t_interval(found)
    if interval is None:
        return f"{mean(found):+.3f}", "one seed"
    verdict = "no worse" if interval[1] < NO_WORSE else "cannot be said"
    return with_interval(found, "{:+.3f}"), "higher" if interval[0] > 0 else verdict
