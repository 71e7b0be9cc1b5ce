"""What charts of runs are put together from: records, colours, labels, panels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etr.report.results import Results
from etr.report.spec import Chart
from etr.report.style import SOFT, looks
from etr.report.wording import clipped_inside

NAME = 20
"""Letters of a name beside its line."""
LINE = 13
"""Pixels from one label to the next."""
PADDING = {"left": 4, "top": 8, "right": 8, "bottom": 4}
HIDDEN = {"name": "hidden", "value": []}
SHOWN = {"filter": "indexof(hidden, datum.variant) < 0"}
"""The page's legend says which variants a chart leaves out."""


def rounded(values: Iterable[float]) -> list[float | None]:
    """Numbers as a page needs them: five digits, None where there is none."""
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def numeric(field: str, title: str | None, **options: Any) -> dict[str, Any]:
    """An encoding of a number; options are those of the axis, and `scale`."""
    scale = options.pop("scale", {"zero": False})
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "scale": scale,
        **({"axis": options} if options else {}),
    }


def nominal(field: str, order: Sequence[str] | None = None, **options: Any) -> dict[str, Any]:
    """An encoding of a name, in the order given or that of the data."""
    sort = list(order) if order is not None else None
    return {"field": field, "type": "nominal", "sort": sort, "title": None, **options}


def colors(
    results: Results, shown: Sequence[str], *, dash: bool = False, shape: bool = False
) -> Any:
    """Encodings that give the variants their colours, and their dashes or markers."""
    every = looks(results.names)
    found = [every[name] for name in shown]
    domain = list(shown)
    legend = {"columns": 3, "title": None, **({"symbolType": "stroke"} if dash else {})}
    given = {
        "color": [look.tint.css for look in found],
        **({"strokeDash": [list(look.dashes) or [1, 0] for look in found]} if dash else {}),
        **({"shape": [look.shape for look in found]} if shape else {}),
    }
    return {
        channel: {
            **nominal("variant", domain),
            "scale": {"domain": domain, "range": values},
            "legend": legend,
        }
        for channel, values in given.items()
    }


def only(kind: str) -> list[dict[str, Any]]:
    """The transform that leaves the records of a kind."""
    return [{"filter": f"datum.kind == '{kind}'"}]


def tip(*fields: tuple[str, str, str | None]) -> list[dict[str, Any]]:
    """What a pointer is told: field, title and number format of each line."""
    return [
        {"field": field, "title": title, "type": "quantitative", "format": form}
        if form
        else {"field": field, "title": title, "type": "nominal"}
        for field, title, form in fields
    ]


def label_places(wanted: Mapping[str, float], height: float) -> dict[str, float]:
    """Pixels from the top for a label of each line: near its end, and none over another."""
    order = sorted(wanted, key=lambda name: wanted[name])
    places: list[float] = []
    for name in order:
        least = places[-1] + LINE if places else 0.0
        places.append(max(wanted[name], least))
    most = height
    for at in reversed(range(len(places))):
        places[at] = min(places[at], most)
        most = places[at] - LINE
    return dict(zip(order, places, strict=True))


def labels(results: Results, places: Mapping[str, float]) -> list[dict[str, Any]]:
    """Records of names beside their lines."""
    return [
        {
            "kind": "label",
            "variant": name,
            "x": [0],
            "y": [0],
            "py": round(place, 1),
            "name": clipped_inside(name, NAME),
        }
        for name, place in places.items()
    ]


def label_layer() -> dict[str, Any]:
    """The layer of names beside their lines; the chart leaves room for them."""
    return {
        "transform": only("label"),
        "mark": {
            "type": "text",
            "align": "left",
            "baseline": "middle",
            "dx": 7,
            "fontSize": 10.5,
            "clip": False,
        },
        "encoding": {
            "x": {"value": "width"},
            "y": {"field": "py", "type": "quantitative", "scale": None},
            "text": {"field": "name", "type": "nominal"},
        },
    }


def panels(
    records: Sequence[Mapping[str, Any]],
    spec: Chart,
    *,
    height: int = 160,
    least: int = 220,
    between: int = 18,
    transform: Sequence[Mapping[str, Any]] = (),
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
    return {
        "data": {"values": list(records)},
        "params": [HIDDEN],
        "transform": [SHOWN, *transform],
        "facet": {
            **nominal("panel", names),
            "header": {"labelLimit": max(least, 200), "title": None},
        },
        "spec": {"height": height, **spec},
        "usermeta": {"panels": len(names), "least": least, "between": between},
        **(
            {
                "resolve": {
                    "axis": dict.fromkeys(independent, "independent"),
                    "scale": dict.fromkeys(independent, "independent"),
                }
            }
            if independent
            else {}
        ),
    }


def rule(axis: str, value: float) -> Chart:
    """A thin dotted line across a chart of lines at a value of one axis."""
    across = {"x": "height", "y": "width"}[axis]
    other = {"x": "y", "y": "x"}[axis]
    return {
        "data": {"values": [{}]},
        "mark": {"type": "rule", "strokeDash": [2, 3]},
        "encoding": {
            axis: {"datum": value},
            other: {"value": 0},
            f"{other}2": {"value": across},
            "color": {"value": SOFT.css},
        },
    }


def heat(scheme: Sequence[str], domain: Sequence[float], title: str) -> dict[str, Any]:
    """The colour of a cell by its `value`."""
    return {
        "field": "value",
        "type": "quantitative",
        "scale": {
            "domain": list(domain),
            "range": list(scheme),
            "clamp": True,
            "interpolate": "rgb",
        },
        "legend": {
            "title": title,
            "titleLimit": 300,
            "gradientLength": 200,
            "values": list(domain),
            "format": ".2~f",
        },
    }


def cells(color: Any, x: str, y: str, tooltip: Any, **axis: Any) -> Chart:
    """A panel of rectangles: `column` along x, `row` along y, row 0 on top."""
    whole = {"grid": False, "labelOverlap": True, "domain": False, "ticks": False}
    return {
        "mark": {"type": "rect", "stroke": None, "strokeWidth": 0},
        "encoding": {
            "x": {"field": "column", "type": "ordinal", "title": x,
                  "axis": {**whole, "labelAngle": 0, **axis}},
            "y": {"field": "row", "type": "ordinal", "title": y, "axis": whole, "sort": None},
            "color": color,
            "tooltip": tooltip,
        },
    }  # fmt: skip


ROWS: list[dict[str, Any]] = [{"flatten": ["value"]},
        {"window": [{"op": "row_number", "as": "place"}], "groupby": ["panel", "row"]},
        {"calculate": "datum.place - 1", "as": "column"}]  # fmt: skip
"""A row of cells for each record: its list `value` becomes cells of columns from 0."""
