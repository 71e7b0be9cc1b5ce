"""Capacity of experts: as a factor, and in tokens against its lower bound."""

from typing import Any

from etr.report.curves import gather, layer_curve, thin, train_curve
from etr.report.lines import (
    MOST_POINTS_IN_ALL,
    STEPS,
    curve_numbers,
    line_chart,
    log_ticks,
    not_shown,
    values_domain,
)
from etr.report.marks import SHARED, colors, layer, mark, named, numeric, panels, rounded, tip
from etr.report.results import Results
from etr.report.spec import Missing, Plot, Spec
from etr.report.wording import TIMES

_DASHES = {"capacity": [1, 0], "capacity_lower_bound": [2, 3]}


def _factor(results: Results) -> Plot | Missing:
    pick = train_curve("capacity_factor")
    variants = gather(results, pick)
    if not variants:
        return Missing("no run limits its experts by a capacity")
    domain, cut = values_domain(variants, smoothed=False)
    y = {"title": f"capacity factor ({TIMES} even share)"}
    return Plot(
        chart=line_chart(results, variants, y, domain, smoothed=False),
        caption="Tokens that an expert may keep, in multiples of choices / experts; mean over"
        f" seeds and layers.{cut}{not_shown(results, variants)}",
        numbers=curve_numbers(results, {"capacity factor": pick}),
    )


def _against_bound(results: Results) -> Plot | Missing:
    count = max(
        (
            curves.shape[1]
            for row in results.rows
            if row.metrics
            if (curves := row.metrics.layers.get("capacity_lower_bound")) is not None
        ),
        default=0,
    )
    layers = sorted({0, count - 1}) if count else []
    bounded = [v for at in layers for v in gather(results, layer_curve("capacity_lower_bound", at))]
    if not bounded:
        return Missing("no run has a lower bound of its capacity; it needs cosine scores")
    picks = {
        f"{field}, layer {layer} (tokens)": layer_curve(field, layer)
        for layer in range(count)
        for field in ("capacity", "capacity_lower_bound")
    }
    return Plot(
        chart=_chart(results, list(dict.fromkeys(v.name for v in bounded)), layers),
        caption="Solid: most tokens an expert may keep. Dotted: the published lower bound, 1 / (E"
        " erfc z) with z from the chosen affinities and the width, which says something only in a"
        " narrow band of affinities. No solid line where nothing is dropped. Mean over seeds, first"
        f" and last MoE layer.{not_shown(results, bounded)}",
        numbers=curve_numbers(results, picks),
        wide=True,
    )


def _chart(results: Results, names: list[str], layers: list[int]) -> dict[str, Any]:
    most = max(12, min(120, MOST_POINTS_IN_ALL // (2 * len(layers) * len(names))))
    records: list[dict[str, Any]] = [
        {**head, "x": rounded(line.x), "y": rounded(line.y)}
        for at in layers
        for what in _DASHES
        for variant in gather(results, layer_curve(what, at))
        if variant.name in names
        for line in (thin(variant.line, most),)
        for head in ({"panel": f"layer {at}", "variant": variant.name, "what": what},)
    ]
    values = [y for record in records for y in record["y"] if y and y > 0] or [1.0]
    low, high = min(values) / 1.1, max(values) * 1.1
    title = "capacity (tokens/expert, log)"
    scale = {"type": "log", "domain": [low, high], "nice": False}
    # Markers where some line is a point; elsewhere a pointer alone finds them.
    short = any(len(record["x"]) == 1 for record in records)
    spec = {
        "encoding": {
            "x": numeric("x", STEPS, format="~s", tickCount=5),
            "y": numeric("y", title, scale=scale, values=log_ticks(low, high), format="~s"),
            **colors(results, names),
            "strokeDash": named("what", _DASHES) | SHARED,
            "tooltip": tip(what=("quantity", None), x=("step", ","), y=(title, ".4~s")),
        },
        "layer": [
            layer(mark("line", strokeWidth=1.7)),
            {
                "name": "points" if short else "hover",
                **layer(mark("point", size=24, opacity=1 if short else 0.01)),
            },
        ],
    }
    return panels(records, spec, height=230, least=330)


FACTOR = Spec("capacity-factor", "Capacity factor over training", "Dropping", _factor)
LOWER_BOUND = Spec(
    "capacity-lower-bound", "Capacity against its lower bound", "Dropping", _against_bound
)
