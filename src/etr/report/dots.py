"""Figures of rows: a dot of each variant in every row, or bars made of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from etr.report.marks import (
    FRAME,
    SHOWN,
    colors,
    layer,
    mark,
    named,
    nominal,
    numeric,
    rounded,
    shapes,
    tip,
)
from etr.report.results import Results
from etr.report.spec import Chart
from etr.report.style import GRID, Tint
from etr.report.wording import clipped_inside

Dot = tuple[str, str, float, float, float]
"""Row, variant, value, and the ends of a line through it."""


def dot_chart(
    results: Results,
    dots: Sequence[Dot],
    rows: Sequence[str],
    title: str,
    *,
    zero: bool = False,
    letters: int = 24,
) -> Chart:
    """A line of dots for each row, the variants one below the other in it.

    Args:
        results: the runs.
        dots: what is drawn.
        rows: in order from the top.
        title: of the values.
        zero: whether the axis starts at 0.
        letters: of a row's name that are written.
    """
    names = [name for name in results.names if any(dot[1] == name for dot in dots)]
    written = {row: clipped_inside(row, letters) for row in rows}
    records = [
        {"row": written[row], "variant": name, "value": value, "low": low, "high": high}
        for row, name, *values in dots
        for value, low, high in (rounded(values),)
    ]
    axis = {"grid": True, "bandPosition": 1, "labelPadding": 8, "gridColor": GRID.css}
    low = numeric("low", title, grid=True, scale={"zero": zero, "padding": 8})
    told = {"value": (title, ",.5~g"), "low": ("from", ",.5~g"), "high": ("to", ",.5~g")}
    return {
        "data": {"values": records},
        **FRAME,
        "transform": [SHOWN],
        "height": max(160, max(34, 9 * len(names)) * len(rows)),
        "encoding": {
            "y": nominal("row", (written[row] for row in rows), axis=axis),
            "yOffset": nominal("variant", names),
            **colors(results, names),
        },
        "layer": [
            layer(mark("rule", strokeWidth=1.4), x=low, x2={"field": "high"}),
            layer(
                mark("point", filled=True, size=42, opacity=1),
                x={"field": "value", "type": "quantitative", "title": title},
                **shapes(results, names),
                tooltip=tip(row=("row", None), **told),
            ),
        ],
    }


def part_chart(
    runs: Sequence[tuple[str, str, Sequence[float]]],
    parts: Mapping[str, Tint],
    title: str,
    form: str,
) -> Chart:
    """A bar for each run, made of parts.

    Args:
        runs: what is written beside a bar, its variant, and the parts' lengths.
        parts: names and colours.
        title: of the lengths.
        form: how a pointer is told a length.
    """
    records = [
        {"run": run, "variant": variant, "part": part, "order": place, "value": value}
        for run, variant, values in runs
        for place, (part, value) in enumerate(zip(parts, rounded(values), strict=True))
    ]
    order = [run for run, _, _ in runs]
    scale = {"zero": True}
    tints = {part: tint.css for part, tint in parts.items()}
    return {
        "data": {"values": records},
        **FRAME,
        "transform": [SHOWN],
        "height": max(160, 26 * len(order)),
        **layer(
            mark("bar", height={"band": 0.68}),
            y=nominal("run", order, axis={"labelLimit": 150}),
            x={**numeric("value", title, grid=True, scale=scale), "stack": "zero"},
            order={"field": "order", "type": "quantitative"},
            color=named("part", tints, columns=2),
            tooltip=tip("run", part=("part", None), value=(title, form)),
        ),
    }
