"""Calinski-Harabasz ratio of experts' tokens over training, with its trimming control."""

import numpy as np

from etr.report.curves import Curve, CurveOf, clean
from etr.report.found import MOST_RUNS, first_of_each, too_many
from etr.report.lines import STEPS, curve_numbers, not_shown
from etr.report.marks import SHARED, colors, layer, mark, named, numeric, panels, rounded, tip
from etr.report.observations import CLUSTERINGS
from etr.report.results import Results, Row
from etr.report.spec import Missing, Plot, Spec
from etr.report.style import SOFT

_DASHES = {"all": [2, 3], "kept": [1, 0], "trimmed": [7, 3]}


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
        return Missing("no run has Calinski-Harabasz ratios in its diagnostics")
    shown = found[:MOST_RUNS]
    depth = max(
        len(d.layers) for run in found if run.row.metrics for d in run.row.metrics.diagnostics
    )
    records = [
        {"panel": run.name, "variant": run.name, "tokens": name, "x": x, "y": rounded(curve.y)}
        for run in shown
        for name, curve in run.value.items()
        for x in (rounded(curve.x),)
    ]
    grey = {"condition": {"test": "datum.tokens == 'trimmed'", "value": SOFT.css}, **SHARED}
    ratio = "between / within"
    spec = layer(
        mark("line", strokeWidth=1.7, point={"size": 22, "filled": True}),
        x=numeric("x", STEPS, format="~s", tickCount=4),
        y=numeric("y", ratio, scale={"zero": True}, tickCount=4),
        color=colors(results, [run.name for run in shown])["color"] | grey,
        strokeDash=named("tokens", _DASHES, title="tokens", symbolType="stroke"),
        tooltip=tip(tokens=("tokens", None), x=("step", ","), y=(ratio, ".4~f")),
    )
    return Plot(
        chart=panels(records, spec),
        caption="Spread between the experts' mean tokens over the spread within them, at the last"
        " MoE layer's input. Solid: kept tokens. Dotted: all tokens. Grey dashes:"
        " control, all tokens with the rise that trimming alone gives. Kept above the control"
        " means that experts keep clusters. First seed of each variant; compare values at equal"
        f" numbers of tokens alone.{too_many(found)}"
        f"{not_shown(results, found)}",
        numbers=curve_numbers(
            results,
            {
                f"{name} tokens, layer {layer}": _ratio(name, layer)
                for layer in range(depth)
                for name in CLUSTERINGS
            },
        ),
        wide=True,
    )


SPEC = Spec("calinski-harabasz", "Do experts keep clusters of tokens?", "Specialisation", _draw)
