"""A figure as a value, and how it leaves: into a page, or as SVG and PNG files.

A figure is one Vega-Lite specification. The page shows it as a picture that needs no script, and
as a chart where scripts run; files of their own are drawn from the same.
"""

from __future__ import annotations

import copy
import json
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from etr.files import write_bytes
from etr.report.spec import Chart, Plot, Section
from etr.report.style import CARD, CONFIG, INK, SOFT, in_light
from etr.report.svg import page_slim, slim

HALF, WHOLE = 488, 1034
"""Pixels of a chart in half a row and in a whole row of the page."""
FILE = 560
"""Pixels of a chart in a file of its own."""
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
VEGA_LITE = "6.4"
"""Version that draws; vl-convert has it inside."""
PNG_SCALE = 2
INTERACTIVE = ("hover", "zoom")
"""Names of layers and parameters that only a chart under a pointer needs."""


@dataclass(frozen=True, kw_only=True)
class Drawing(Plot):
    """A figure that could be drawn."""

    key: str
    """Name of its files and of its place in the page: lower case, digits and dashes."""
    title: str
    """The finding where the data decide one, else what is shown."""
    section: Section
    """Where in the page."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A figure that the data did not allow."""

    key: str
    """As in `Drawing`."""
    title: str
    """What would have been shown."""
    reason: str
    """What is missing."""


def sized(chart: Chart, width: int) -> Chart:
    """A copy that fills `width` pixels; panels are as many in a row as fit. The page's script
    does the same for the room that it finds."""
    chart = copy.deepcopy(chart)
    if "facet" in chart:
        count, least, between, beside = chart["usermeta"].values()
        rows = -(-count // max(1, (width - 40) // least))
        columns = -(-count // rows)
        chart["columns"] = columns
        chart["spec"]["width"] = (width - beside) // columns - between
    else:
        chart["width"] = width
        chart["autosize"] = {"type": "fit-x", "contains": "padding"}
    return {"$schema": SCHEMA, **chart}


def page_spec(drawing: Drawing) -> Chart:
    """The specification for the page's script, which makes the page's one legend serve it."""
    chart = _walk(drawing.chart, _without_legend)
    return {**chart, "config": CONFIG}


def page_svg(drawing: Drawing, whole: bool) -> str:
    """The picture for a whole or half row of the page, as an `<svg>` element whose colours are CSS
    variables."""
    svg = page_slim(_svg(_still(page_spec(drawing)), WHOLE if whole else HALF, drawing.key))
    return svg.replace("<svg", f'<svg role="img" aria-labelledby="{drawing.key}-title"', 1)


def save_files(drawing: Drawing, folder: Path) -> tuple[Path, Path]:
    """Write the drawing with title and caption as KEY.svg and KEY.png; returns both paths."""
    import vl_convert

    paths = folder / f"{drawing.key}.svg", folder / f"{drawing.key}.png"
    chart = titled(drawing.chart, drawing.title, [drawing.caption])
    svg = in_light(slim(_svg(_in_file(chart), FILE, drawing.key)))
    write_bytes(paths[0], svg.encode("utf-8", errors="replace"))
    write_bytes(paths[1], vl_convert.svg_to_png(svg, scale=PNG_SCALE))
    return paths


def save_svg(chart: Chart, path: Path) -> None:
    """Write a chart as it is: without title and caption, unless it is `titled`."""
    name = re.sub(r"[^\w-]", "-", path.stem)
    svg = in_light(slim(_svg(_in_file(chart), FILE, name), step=1))
    write_bytes(path, svg.encode("utf-8", errors="replace"))


@cache
def script() -> str:
    """The JavaScript that shows specifications: Vega, Vega-Lite and Vega-Embed, offline."""
    import vl_convert

    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE))


def _svg(chart: Chart, width: int, name: str) -> str:
    """The picture; its ids begin with `name`, so that several fit one page."""
    import vl_convert

    # Half a surrogate pair in a name is not UTF-8.
    spec = json.dumps(sized(chart, width)).encode("utf-8", "replace").decode()
    svg = str(vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE))
    # They count on from picture to picture, and no file would be the same twice.
    ids = {old: f"{name}-{new}" for new, old in enumerate(re.findall(r'<[^>]* id="([^"]+)"', svg))}
    for old, new in ids.items():
        svg = svg.replace(f' id="{old}"', f' id="{new}"').replace(f"url(#{old})", f"url(#{new})")
    return svg


def titled(chart: Chart, title: str, lines: Sequence[str]) -> Chart:
    """The specification of a file: with a title, and lines below it, above the chart."""
    return {
        **chart,
        "padding": 14,
        "title": {
            "text": textwrap.wrap(title, 62),
            "subtitle": [part for line in lines for part in textwrap.wrap(line, 92)],
            "anchor": "start",
            "frame": "bounds",
            "fontSize": 15,
            "subtitleFontSize": 11,
            "subtitlePadding": 6,
            "offset": 12,
            "color": INK.css,
            "subtitleColor": SOFT.css,
        },
    }


def _in_file(chart: Chart) -> Chart:
    """Without what a pointer needs, on a card."""
    return {**_still(chart), "config": {**CONFIG, "background": CARD.css}}


def _still(chart: Chart) -> Chart:
    """The specification without what a pointer needs."""

    def strip(entry: dict[str, Any]) -> dict[str, Any]:
        for key in ("layer", "params"):
            if key in entry:
                entry[key] = [e for e in entry[key] if e.get("name") not in INTERACTIVE]
        return entry

    return _walk(chart, strip)


def _without_legend(entry: dict[str, Any]) -> dict[str, Any]:
    return (
        {**entry, "legend": None} if entry.get("field") == "variant" and "scale" in entry else entry
    )


def _walk(value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A copy in which every object but data is what `change` makes of it."""
    if isinstance(value, dict):
        found = {k: v if k == "data" else _walk(v, change) for k, v in value.items()}
        return change(found)
    return [_walk(entry, change) for entry in value] if isinstance(value, list) else value
