"""Calinski-Harabasz ratio of experts' tokens over training, with its trimming control."""

import numpy as np

from etr.report.curves import Curve, CurveOf, clean
from etr.report.figure import direct_label
from etr.report.lines import curve_numbers, label_steps, not_shown
from etr.report.matrices import MOST_RUNS, first_of_each, panels, too_many
from etr.report.observations import CLUSTERINGS
from etr.report.results import Results, Row
from etr.report.spec import Missing, Plot, Spec
from etr.report.style import SOFT, variant_style

_LOOKS = {"all": (0, (1.2, 1.4)), "kept": "solid", "trimmed": (0, (5, 1.8))}


def _ratio(clustering: str, layer: int = -1) -> CurveOf:
    def pick(row: Row) -> Curve | None:
        rows = row.metrics.diagnostics if row.metrics else ()
        points = [
            (d.step, d.layers[layer].calinski_harabasz[clustering])
            for d in rows
            if -len(d.layers) <= layer < len(d.layers)
        ]
        steps = np.array([step for step, _ in points], dtype=np.float64)
        return clean(steps, np.array([value for _, value in points], dtype=np.float64))

    return pick


def _curves(row: Row) -> dict[str, Curve] | None:
    return {name: curve for name in CLUSTERINGS if (curve := _ratio(name)(row))} or None


def _draw(results: Results) -> Plot | Missing:
    found = first_of_each(results, _curves)
    if not found:
        return Missing(reason="no run has Calinski-Harabasz ratios in its diagnostics")
    shown = found[:MOST_RUNS]
    columns = min(2, len(shown))
    figure, grid = panels(len(shown), columns, 1.8, above=0.5)
    for place, (axes, run) in enumerate(zip(grid.flat, shown, strict=False)):
        look = variant_style(run.index)
        for name, curve in run.value.items():
            grey = name == "trimmed"
            axes.plot(
                curve.x,
                curve.y,
                color=SOFT.light if grey else look.color,
                linestyle=_LOOKS[name],
                marker=look.marker if name == "kept" or curve.x.size == 1 else None,
                markersize=4.0,
            )
        axes.set_ylim(bottom=0)
        direct_label(axes, run.name)
        if place % columns == 0:
            axes.set_ylabel("between / within")
        if place + columns >= len(shown):
            label_steps(axes)
    depth = max(
        len(d.layers) for run in found if run.row.metrics for d in run.row.metrics.diagnostics
    )
    return Plot(
        figure=figure,
        caption="Spread between the experts' mean tokens over the spread within them, at the last"
        " MoE layer's input. Line with markers: kept tokens. Dotted: all tokens. Grey dashes:"
        " control, all tokens with the rise that trimming alone gives. Kept above the control"
        " means that experts keep clusters. First seed of each variant; compare values at equal"
        f" numbers of tokens alone.{too_many(found)}"
        f"{not_shown(results, [run.name for run in found])}",
        numbers=curve_numbers(
            results,
            {
                f"{name} tokens, layer {layer}": _ratio(name, layer)
                for layer in range(depth)
                for name in CLUSTERINGS
            },
        ),
    )


SPEC = Spec(
    key="calinski-harabasz",
    title="Do experts keep clusters of tokens?",
    section="Specialisation",
    draw=_draw,
)
