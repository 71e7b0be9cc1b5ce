"""Figures of lines over training, one per variant: what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from etr.report.curves import Curve, CurveOf, VariantCurves, gather, mean_curve, smooth, thin
from etr.report.labels import LINE, label_layer, label_places, labels
from etr.report.marks import (
    FRAME,
    PLAIN_ZERO,
    SHARED,
    SHOWN,
    WHOLE_DOTS,
    colors,
    layer,
    mark,
    named,
    numeric,
    rounded,
    tip,
)
from etr.report.results import Results
from etr.report.spec import Chart, Missing, Numbers, Plot
from etr.report.style import looks
from etr.report.wording import listed

HEIGHT = 250
MOST_POINTS = 120
# All lines of a figure together, so that many variants do not make a page of many megabytes.
MOST_POINTS_IN_ALL = 3_000
FEW = 6
"""Variants up to which the raw means are drawn faint."""
SMOOTHED = "mean over seeds, a moving mean over a fortieth of the steps, the raw mean faint"
CUT = " The axis is cut above the steep start."
STEPS = "optimizer steps"
Domain = tuple[float, float]


class Named(Protocol):
    """What is of a variant."""

    @property
    def name(self) -> str: ...


def line_chart(
    results: Results,
    variants: Sequence[VariantCurves],
    y: dict[str, Any],
    domain: Domain,
    *,
    x: str = STEPS,
    form: str = ".4~f",
    smoothed: bool = True,
    log: bool = False,
    more: Sequence[Chart] = (),
) -> Chart:
    """Lines with their names beside them; evaluations as markers.

    Args:
        results: the runs.
        variants: their lines.
        y: options of the vertical axis, its `title` among them.
        domain: of the vertical axis.
        x: title of the horizontal axis.
        form: how a pointer is told a value.
        smoothed: whether lines are smoothed, the raw ones faint.
        log: whether the vertical axis is logarithmic.
        more: layers besides.
    """
    names = [variant.name for variant in variants]
    height = max(HEIGHT, LINE * len(names) + 10)
    lines = {v.name: smooth(v.line) if smoothed else v.line for v in variants}
    places = label_places(
        {n: height * (1 - _share(float(c.y[-1]), domain, log)) for n, c in lines.items()}, height
    )
    records = [r for v in variants for r in _records(v, lines[v.name], len(names), smoothed)]
    xs = [float(end) for c in lines.values() for end in (c.x[0], c.x[-1])]
    ends = [min(xs), max(xs)] if min(xs) < max(xs) else [min(xs) - 0.5, max(xs) + 0.5]
    along = {"domain": ends, **WHOLE_DOTS}
    scale = {"domain": rounded(domain), "nice": False}
    if log:
        scale["type"], y = "log", y | {"values": log_ticks(*domain)}
    title, axis = y["title"], {key: value for key, value in y.items() if key != "title"}
    told = tip(x=("step", ",") if x == STEPS else (x, ",.4~s"), y=(title, form))
    return {
        "data": {"values": [*records, *labels(places)]},
        **FRAME,
        "transform": [SHOWN, {"flatten": ["x", "y"]}],
        "height": height,
        "encoding": {
            "x": numeric("x", x, scale=along, format="~s", labelExpr=PLAIN_ZERO, tickCount=6),
            "y": numeric("y", title, scale=scale, **axis),
            "color": colors(results, names)["color"] | SHARED,
        },
        "layer": [*_layers(results, names, told), *more, label_layer()],
    }


def _layers(results: Results, names: Sequence[str], told: Any) -> list[Chart]:
    every = looks(results.names)
    dash = named("variant", {name: every[name].dashes or (1, 0) for name in names}) | SHARED
    zoom = {"type": "interval", "zoom": "wheel![event.shiftKey]"}
    near = {"type": "point", "on": "pointerover", "clear": "pointerout"}
    seen = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0.01}
    dot = {"filled": True, "clip": True}
    return [
        {
            "params": [{"name": "zoom", "select": zoom, "bind": "scales"}],
            **layer(mark("line", strokeWidth=0.7, opacity=0.28, clip=True), "raw"),
        },
        layer(mark("line", strokeWidth=1.9, clip=True), "line", strokeDash=dash),
        layer(mark("point", size=36, opacity=1, **dot), "point"),
        {
            "name": "hover",
            "params": [{"name": "near", "select": near}],
            **layer(mark("point", size=110, **dot), "hover", opacity=seen, tooltip=told),
        },
    ]


def _records(
    variant: VariantCurves, line: Curve, count: int, smoothed: bool
) -> list[dict[str, Any]]:
    most = min(MOST_POINTS, MOST_POINTS_IN_ALL // count)
    kinds = {"line" if line.x.size > 1 else "point": thin(line, most)}
    if smoothed and count <= FEW and line.x.size > 1:
        kinds["raw"] = thin(variant.line, most)
    hover = thin(line, max(12, min(40, 1200 // count)))
    if variant.points:
        held_out = mean_curve(variant.points)
        kinds["point"] = held_out
        hover = held_out if held_out.x.size > 4 else hover
    kinds["hover"] = hover
    return [
        {"kind": kind, "variant": variant.name, "x": rounded(c.x), "y": rounded(c.y)}
        for kind, c in kinds.items()
    ]


def _share(value: float, domain: Domain, log: bool) -> float:
    """How far up an axis a value lies, within it."""
    low, high = np.log(domain) if log else domain
    value = np.log(max(value, 1e-300)) if log else value
    return float(np.clip((value - low) / (high - low), 0, 1))


def values_domain(
    variants: Sequence[VariantCurves], *, from_zero: bool = False, smoothed: bool = True
) -> tuple[Domain, str]:
    """Range of the vertical axis, without a steep start, which would press what is compared into
    a few pixels; and a sentence for the caption where something was cut, else nothing."""
    lines = [smooth(v.line).y if smoothed else v.line.y for v in variants]
    lines += [mean_curve(variant.points).y for variant in variants if variant.points]
    # The first step alone may be far off in a line of few points too.
    top = max(float(y[min(max(y.size // 8, 1), y.size - 1) :].max()) for y in lines)
    whole = max(float(y.max()) for y in lines)
    bottom = min(float(y.min()) for y in lines)
    bottom = min(bottom, 0.0) if from_zero else bottom
    cut = top > bottom and whole - bottom >= 1.3 * (top - bottom)
    high = top if cut else whole
    room = 0.06 * (high - bottom) or 0.05 * abs(high) or 0.01
    low = bottom if from_zero and bottom == 0 else bottom - room
    return (low, high + room), CUT if cut else ""


def log_ticks(low: float, high: float) -> list[float]:
    """Marks of a logarithmic axis: of each decade, of 1, 2 and 5, or evenly apart; at least three.

    Args:
        low, high: ends of the axis, above 0.
    """
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    steps = [10.0**n * s for n in range(-6, 12) for s in (5, 2, 1)]
    even = ([step * n for n in range(int(low / step), int(high / step) + 2)]
            for step in sorted(steps, reverse=True) if (high - low) / step < 20)  # fmt: skip
    for found in ([*decades], [d * s for d in decades for s in (1, 2, 5)], *even):
        inside = [tick for tick in map(_plain, found) if low <= tick <= high]
        if len(inside) >= 3:
            return inside[:: -(-len(inside) // 12)]
    return [_plain(low), _plain((low + high) / 2), _plain(high)]


def _plain(value: float) -> float:
    return float(f"{value:.4g}")


def not_shown(results: Results, shown: Iterable[str | Named], what: str = "no values") -> str:
    """A sentence that names the variants a figure lacks; nothing where it has all."""
    names = {entry if isinstance(entry, str) else entry.name for entry in shown}
    missing = [name for name in results.names if name not in names]
    return f" Not shown, {what}: {listed(missing)}." if missing else ""


def curve_numbers(results: Results, curves: dict[str, CurveOf], x: str = "step") -> Numbers:
    """Every run's curves, not averaged, smoothed or thinned: one line per point.

    Args:
        results: the runs.
        curves: by name with unit.
        x: name of what they run along.
    """
    return Numbers(
        columns=("run", "seed", "quantity", x, "value"),
        rows=[
            (row.name, row.seed, name, float(at), float(value))
            for name, pick in curves.items()
            for row in results.rows
            if (curve := pick(row))
            for at, value in zip(curve.x, curve.y, strict=True)
        ],
    )


def plot_curve(
    results: Results,
    pick: CurveOf,
    *,
    label: str,
    caption: str,
    lacking: str,
    percent: bool = False,
    from_zero: bool = True,
    headline: Callable[[Sequence[VariantCurves]], str | None] = lambda variants: None,
) -> Plot | Missing:
    """A figure of one quantity against steps, a line per variant.

    Args:
        results: the runs.
        pick: the quantity of one run.
        label: of the vertical axis, with unit.
        caption: what it shows and how it is computed, one sentence without its full stop.
        lacking: why there is no figure if no run has the quantity.
        percent: whether values are shares, written in percent.
        from_zero: whether the axis starts at 0.
        headline: the title where the lines decide one.
    """
    variants = gather(results, pick)
    if not variants:
        return Missing(lacking)
    domain, cut = values_domain(variants, from_zero=from_zero)
    shares = ".1%" if domain[1] - domain[0] < 0.05 else ".0%"
    y = {"title": label, "format": shares if percent else "~s"}
    form = ".2%" if percent else ".4~s"
    return Plot(
        chart=line_chart(results, variants, y, domain, form=form),
        caption=f"{caption}; {SMOOTHED}.{cut}{not_shown(results, variants)}",
        numbers=curve_numbers(results, {label: pick}),
        title=headline(variants),
    )
