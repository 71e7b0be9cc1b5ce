"""Names beside the lines that they are of, none over another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etr.report.marks import layer, mark, nominal
from etr.report.wording import clipped_inside

NAME = 20
"""Letters of a name beside its line."""
LINE = 13
"""Pixels from one label to the next."""


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


def labels(places: Mapping[str, float]) -> list[dict[str, Any]]:
    """Records of names beside their lines."""
    place = {"kind": "label", "x": [0], "y": [0]}
    return [
        {**place, "variant": name, "py": round(at, 1), "name": clipped_inside(name, NAME)}
        for name, at in places.items()
    ]


def label_layer() -> dict[str, Any]:
    """The layer of names beside their lines; the chart leaves room for them."""
    y = {"field": "py", "type": "quantitative", "scale": None}
    look = mark("text", align="left", baseline="middle", dx=7, fontSize=10.5, clip=False)
    return layer(look, "label", x={"value": "width"}, y=y, text=nominal("name"))
