"""What charts of runs are put together from: records, marks, colours, panels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etr.report.results import Results
from etr.report.spec import Chart
from etr.report.style import LOAD_MAP, SOFT, looks

HIDDEN = {"name": "hidden", "value": []}
SHOWN = {"filter": "indexof(hidden, datum.variant) < 0"}
"""The page's legend says which variants a chart leaves out."""
FRAME = {"params": [HIDDEN], "padding": {"left": 4, "top": 8, "right": 8, "bottom": 4}}
"""What every chart of one panel has beside its data."""
PLAIN_ZERO = "datum.value == 0 ? '0' : datum.label"
"""Labels of an axis, of which that of 0 has neither sign nor unit."""
WHOLE_DOTS = {"nice": False, "padding": 5}
"""Room at both ends of an axis, pixels: marks that end at the frame are not cut there."""
SHARED = {"legend": None}
"""No legend of its own: that of the page, or labels, say whose a mark is."""


def rounded(values: Iterable[float]) -> list[float | None]:
    """Numbers as a page needs them: five digits, None where there is none."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def numeric(field: str, title: str | None, **options: Any) -> dict[str, Any]:
    """An encoding of a number; options are those of the axis, and `scale`."""
    scale = options.pop("scale", {"zero": False})
    axis = {"axis": options} if options else {}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, **axis}


def nominal(field: str, order: Iterable[str] | None = None, **options: Any) -> dict[str, Any]:
    """An encoding of a name, in the order given or that of the data."""
    sort = None if order is None else list(order)
    return {"field": field, "type": "nominal", "sort": sort, "title": None, **options}


def named(field: str, looks: Mapping[str, Any], **legend: Any) -> dict[str, Any]:
    """An encoding of a name by the look that each has."""
    scale = {"domain": list(looks), "range": list(looks.values())}
    return nominal(field, looks, scale=scale, legend={"title": None, "columns": 3, **legend})


def mark(kind: str, **look: Any) -> dict[str, Any]:
    """A mark and how it looks."""
    return {"type": kind, **look}


def layer(mark: dict[str, Any], only: str | None = None, /, **encoding: Any) -> Chart:
    """A mark, the kind of records that it takes alone, and what of them it shows."""
    taken = {} if only is None else {"transform": [{"filter": f"datum.kind == '{only}'"}]}
    return {**taken, "mark": mark, "encoding": encoding}


def colors(results: Results, shown: Iterable[str]) -> dict[str, Any]:
    """The encoding that gives variants their colours."""
    every = looks(results.names)
    return {"color": named("variant", {name: every[name].tint.css for name in shown})}


def shapes(results: Results, shown: Iterable[str]) -> dict[str, Any]:
    """The encoding that gives variants their markers."""
    every = looks(results.names)
    return {"shape": named("variant", {name: every[name].shape for name in shown})}


def tip(lead: str = "variant", /, **fields: tuple[str, str | None]) -> list[dict[str, Any]]:
    """What a pointer is told: whose a mark is, then title and number format of each field."""
    return [
        {"field": field, "title": title, "type": "quantitative", "format": form}
        if form
        else {"field": field, "title": title, "type": "nominal"}
        for field, (title, form) in {lead: (lead, None), **fields}.items()
    ]


def panels(
    records: Sequence[Mapping[str, Any]],
    spec: Chart,
    *,
    height: int = 160,
    least: int = 220,
    between: int = 18,
    transform: Sequence[Mapping[str, Any]] = ({"flatten": ["x", "y"]},),
    independent: Sequence[str] = (),
) -> Chart:
    """Panels, one for each `panel` of the records, in their order.

    Args:
        records: what is drawn; each has `panel` and `variant`.
        spec: one panel.
        height: of a panel, pixels.
        least: width of a panel, pixels.
        between: pixels between two.
        transform: of the records.
        independent: axes that differ from panel to panel.
    """
    names = list(dict.fromkeys(str(record["panel"]) for record in records))
    apart = dict.fromkeys(independent, "independent")
    return {
        "data": {"values": list(records)},
        "params": [HIDDEN],
        "transform": [SHOWN, *transform],
        "facet": nominal("panel", names, header={"labelLimit": max(least, 200), "title": None}),
        "spec": {"height": height, **spec},
        # Axes of each panel's own stand between panels.
        "usermeta": {"panels": len(names), "least": least, "between": between}
        | {"beside": 12 if "y" in apart else 62},
        **({"resolve": {"axis": apart, "scale": apart}} if apart else {}),
    }


def rule(axis: str, value: float) -> Chart:
    """A thin dotted line across a chart of lines at a value of one axis."""
    other, end = {"x": ("y", "height"), "y": ("x", "width")}[axis]
    across = {axis: {"datum": value}, other: {"value": 0}, f"{other}2": {"value": end}}
    look = {"color": {"value": SOFT.css}, "tooltip": {"value": None}}
    return {"mark": mark("rule", strokeDash=[2, 3]), "encoding": {**across, **look}}


LOADS = (0, 0.5, 1, 2, 3)
"""Load over its mean, of the colours of `heat`."""
COSINES = (-1, -0.5, 0, 0.5, 1)
"""The same of cosines and correlations."""


def heat(
    title: str,
    domain: Sequence[float],
    x: str,
    y: str,
    told: Any,
    labels: Any = None,
    scale: Any = None,
) -> Chart:
    """A panel of rectangles in the colours of their `value`.

    Args:
        title: of the values.
        domain: values of the colours.
        x, y: titles of the axes: `column` along x, `row` along y, row 0 on top.
        told: what a pointer is told.
        labels: options of both axes.
        scale: options of the scale of colours.
    """
    axis: dict[str, Any] = {"grid": False, "labelOverlap": True, "domain": False, "ticks": False}
    axis |= {"labelAngle": 0, **(labels or {})}
    colours = {"domain": domain, "range": LOAD_MAP, "clamp": True, "interpolate": "rgb"}
    legend = {"title": title, "titleLimit": 300, "gradientLength": 200, "values": domain}
    color = {"field": "value", "type": "quantitative", "scale": colours | (scale or {})}
    return layer(
        mark("rect", stroke=None, strokeWidth=0),
        x={"field": "column", "type": "ordinal", "title": x, "axis": axis},
        y={"field": "row", "type": "ordinal", "title": y, "axis": axis, "sort": None},
        color={**color, "legend": {**legend, "format": ".2~f"}},
        tooltip=told,
    )


ROWS: list[dict[str, Any]] = [
    {"flatten": ["value"]},
    {"window": [{"op": "row_number", "as": "place"}], "groupby": ["panel", "row"]},
    {"calculate": "datum.place - 1", "as": "column"},
]
"""A row of cells for each record: its list `value` becomes cells of columns from 0."""
