"""Figures of rows: a dot of each variant in every row, or bars made of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from etr.report.marks import HIDDEN, PADDING, SHOWN, colors, nominal, numeric, rounded, tip
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
        {
            "row": written[row],
            "variant": name,
            **dict(zip(("value", "low", "high"), rounded(values), strict=True)),
        }
        for row, name, *values in dots
    ]
    look = colors(results, names, shape=True)
    step = max(34, 9 * len(names))
    return {
        "data": {"values": records},
        "params": [HIDDEN],
        "transform": [SHOWN],
        "height": max(160, step * len(rows)),
        "padding": PADDING,
        "encoding": {
            "y": nominal(
                "row",
                [written[row] for row in rows],
                axis={"grid": True, "bandPosition": 1, "labelPadding": 8, "gridColor": GRID.css},
            ),
            "yOffset": {"field": "variant", "type": "nominal", "sort": names},
            "color": look["color"],
        },
        "layer": [
            {
                "mark": {"type": "rule", "strokeWidth": 1.4},
                "encoding": {
                    "x": numeric("low", title, grid=True, scale={"zero": zero, "padding": 8}),
                    "x2": {"field": "high"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 42, "opacity": 1},
                "encoding": {
                    "x": {"field": "value", "type": "quantitative", "title": title},
                    "shape": look["shape"],
                    "tooltip": tip(
                        ("variant", "variant", None),
                        ("row", "row", None),
                        ("value", title, ",.5~g"),
                        ("low", "from", ",.5~g"),
                        ("high", "to", ",.5~g"),
                    ),
                },
            },
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
    names = list(parts)
    records = [
        {"run": run, "variant": variant, "part": part, "order": place, "value": value}
        for run, variant, values in runs
        for place, (part, value) in enumerate(zip(names, rounded(values), strict=True))
    ]
    order = [run for run, _, _ in runs]
    return {
        "data": {"values": records},
        "params": [HIDDEN],
        "transform": [SHOWN],
        "height": max(160, 26 * len(order)),
        "padding": PADDING,
        "mark": {"type": "bar", "height": {"band": 0.68}},
        "encoding": {
            "y": nominal("run", order, axis={"labelLimit": 150}),
            "x": {
                **numeric("value", title, grid=True, scale={"zero": True}),
                "stack": "zero",
            },
            "order": {"field": "order", "type": "quantitative"},
            "color": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": names, "range": [tint.css for tint in parts.values()]},
                "legend": {"columns": 2, "title": None},
            },
            "tooltip": tip(("run", "run", None), ("part", "part", None), ("value", title, form)),
        },
    }
