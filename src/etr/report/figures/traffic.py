"""Bytes that tokens travel in a step, within and between nodes."""

import numpy as np

from etr.report.figure import add_legend, new_figure
from etr.report.lines import not_shown
from etr.report.matrices import MOST_RUNS, every_run, too_many
from etr.report.results import Results, Row
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.style import SERIES, LineStyle
from etr.report.wording import clipped

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
        return Missing(reason="no run counts the bytes it sends; only runs over several ranks do")
    shown = found[:MOST_RUNS]
    figure = new_figure(height=1.25 + 0.3 * len(shown))
    (axes,) = figure.axes
    for place, run in enumerate(shown):
        left = 0.0
        for sent, (_, _, tint) in zip(run.value, _WAYS, strict=True):
            width = sent / 2**20
            axes.barh(place, width, left=left, height=0.62, color=tint.light, linewidth=0)
            left += width
    axes.set_yticks(range(len(shown)), [clipped(run.name, 22) for run in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("sent in a step (MiB)")
    add_legend(
        figure,
        [(name, LineStyle(tint=tint, dashes=(), marker="s")) for _, name, tint in _WAYS],
        lines=False,
    )
    return Plot(
        figure=figure,
        caption="Bytes of tokens sent to experts on other ranks and back: mean over all steps."
        f"{too_many(found)}{not_shown(results, [run.row.name for run in found])}",
        numbers=Numbers(
            columns=("run", "seed", *(f"{name} (bytes/step)" for _, name, _ in _WAYS)),
            rows=[(run.row.name, run.row.seed, *run.value) for run in found],
        ),
    )


SPEC = Spec(
    key="traffic",
    title="Bytes within and between nodes",
    section="Time and memory",
    draw=_draw,
)
