"""Bytes that tokens travel in a step, within and between nodes."""

import numpy as np

from etr.report.dots import part_chart
from etr.report.found import MOST_RUNS, every_run, too_many
from etr.report.lines import not_shown
from etr.report.results import Results, Row
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.style import SERIES

_WAYS = (
    ("bytes_within_node", "within a node", SERIES[1]),
    ("bytes_between_nodes", "between nodes", SERIES[2]),
)


def _bytes(row: Row) -> tuple[float, ...] | None:
    """Mean per step of each way, bytes; None where no step has any."""
    if row.metrics is None:
        return None
    curves = [row.metrics.train[field] for field, _, _ in _WAYS]
    if not any(np.isfinite(curve).any() for curve in curves):
        return None
    return tuple(float(np.nanmean(c)) if np.isfinite(c).any() else 0.0 for c in curves)


def _draw(results: Results) -> Plot | Missing:
    found = every_run(results, _bytes)
    if not found:
        return Missing("no run counts the bytes it sends; only runs over several ranks do")
    shown = found[:MOST_RUNS]
    bars = [(run.name, run.row.name, [sent / 2**20 for sent in run.value]) for run in shown]
    ways = {name: tint for _, name, tint in _WAYS}
    return Plot(
        chart=part_chart(bars, ways, "sent in a step (MiB)", ",.4~f"),
        caption="Bytes of tokens sent to experts on other ranks and back: mean over all steps."
        f"{too_many(found)}{not_shown(results, [run.row.name for run in found])}",
        numbers=Numbers(
            columns=("run", "seed", *(f"{name} (bytes/step)" for _, name, _ in _WAYS)),
            rows=[(run.row.name, run.row.seed, *run.value) for run in found],
        ),
    )


SPEC = Spec("traffic", "Bytes within and between nodes", "Time and memory", _draw)
