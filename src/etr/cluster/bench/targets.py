"""What the benchmark aims at, and whether it is reached."""

from __future__ import annotations

from etr.cluster.bench.book import Book, MeasuredRow, with_interval
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
        rows = book.rows(shape, "own", (name, "baseline", "locmoe"))
        if len(rows) < 3:
            continue
        own, _, old = rows
        for what, limit, found in (
            ("step time / baseline", 0.50, own.ratios(MeasuredRow.seconds)),
            ("step time / LocMoE", 0.85, own.ratios(MeasuredRow.seconds, old)),
            ("bytes between nodes / baseline", MOST_BYTES["own"], _bytes(own)),
        ):
            met = _met(mean(found), limit)
            lines.append((f"`{name}`", what, f"{limit:.2f}", f"{mean(found):.2f}", met))
        lines.append((f"`{name}`", "held-out loss", "no worse", *_verdict(own.loss_differences())))
    head = ("variant", "target", "at most", "measured", "verdict")
    return "\n" + table(head, lines) if lines else ""


def mixed_target(book: Book, shape: str) -> str:
    """Whether the published ETR sends few enough bytes on mixed text."""
    rows = book.rows(shape, "mixed", ("etr-published", "baseline"))
    if len(rows) < 2:
        return ""
    found, limit = mean(_bytes(rows[0])), MOST_BYTES["mixed"]
    return (
        f"Bytes between nodes of published ETR over the baseline's: {found:.2f}; the target was "
        f"{limit:.2f} at most, {_met(found, limit)}.\n"
    )


def _bytes(row: MeasuredRow) -> list[float]:
    return row.ratios(MeasuredRow.bytes_between_nodes)


def _met(found: float, limit: float) -> str:
    return "met" if found <= limit else "missed"


def _verdict(found: list[float]) -> tuple[str, str]:
    interval = t_interval(found)
    if interval is None:
        return f"{mean(found):+.3f}", "one seed"
    verdict = "no worse" if interval[1] < NO_WORSE else "cannot be said"
    return with_interval(found, "{:+.3f}"), "higher" if interval[0] > 0 else verdict
