"""A figure as a value, and how it leaves: into a page, or as SVG and PNG files."""

import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from etr.files import write_bytes
from etr.report.spec import Numbers, Section
from etr.report.style import CARD, RC, SOFT, TINTS, LineStyle
from etr.report.wording import clipped

WIDTH = 4.9
HEIGHT = 3.2
LEGEND_CHARACTERS = 54
PNG_DOTS_PER_INCH = 180
# Without these matplotlib writes the date and its own name, and no file is the same twice.
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure that could be drawn."""

    key: str
    """Name of its files and of its place in the page: lower case, digits and dashes."""
    title: str
    """The finding where the data decide one, else what is shown."""
    section: Section
    """Where in the page."""
    caption: str
    """What it shows and how it is computed."""
    figure: Figure
    """The drawing, without title and caption."""
    numbers: Numbers
    """What it draws."""
    html: str | None
    """What a page shows in place of the drawing; None for the drawing."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A figure that the data did not allow."""

    key: str
    """As in `Drawing`."""
    title: str
    """What would have been shown."""
    section: Section
    """As in `Drawing`."""
    reason: str
    """What is missing."""


@contextmanager
def house_style() -> Iterator[None]:
    """The project's look while drawing and while writing; nothing stays set afterwards."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC)
        # A browser has the letters that the drawing font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(rows: int = 1, columns: int = 1, *, height: float = HEIGHT) -> Figure:
    """An empty figure of the page's column width with a grid of axes; heights in inches."""
    figure = Figure(figsize=(WIDTH, height))
    figure.subplots(rows, columns, squeeze=False)
    return figure


def add_legend(
    figure: Figure,
    entries: Sequence[tuple[str, LineStyle]],
    *,
    lines: bool = True,
    markers: bool = True,
) -> None:
    """A legend above the axes, as many entries in a row as fit.

    Args:
        figure: where to.
        entries: name and look of each variant.
        lines: whether the figure shows the variants by lines.
        markers: whether it shows them by markers.
    """
    handles = [
        Line2D(
            [],
            [],
            color=style.color,
            linestyle=style.linestyle if lines else "none",
            marker=style.marker if markers else None,
            markersize=4.5,
            label=clipped(name, 30),
        )
        for name, style in entries
    ]
    longest = max(len(str(handle.get_label())) for handle in handles) + 6
    columns = max(1, min(len(handles), LEGEND_CHARACTERS // longest))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, borderaxespad=0.2)


def direct_label(axes: Axes, text: str) -> None:
    """A small heading of one panel among several."""
    axes.set_title(clipped(text, 40), fontsize=8.5, color=SOFT.light, pad=4)


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure alone, without title and caption; inside `house_style`."""
    content = BytesIO()
    figure.savefig(content, format="svg", facecolor=CARD.light, metadata=_NO_METADATA)
    write_bytes(path, content.getvalue())


def inline_svg(drawing: Drawing) -> str:
    """The drawing as an `<svg>` element for an HTML page; its colours are CSS variables.

    Every id starts with the drawing's key, so that several fit one page; nothing is fetched.
    """
    text = _svg(drawing.figure)
    text = re.sub(r"<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    # Tags only: what a name of the results says is left alone. (">" is escaped in attributes.)
    return re.sub(r"<[^>]+>", lambda tag: _embed(tag.group(), drawing.key), text).strip()


def _embed(tag: str, key: str) -> str:
    if tag.startswith("<svg"):
        tag = re.sub(r'\s(?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", tag)
        return tag.replace("<svg", f'<svg role="img" aria-labelledby="{key}-title"')
    if tag.startswith("<image"):  # nothing refers to it, and equal images have equal ids
        tag = re.sub(r'\sid="[^"]*"', "", tag)
    tag = tag.replace("xlink:href=", "href=")
    tag = tag.replace(' id="', f' id="{key}-').replace(' href="#', f' href="#{key}-')
    tag = tag.replace("url(#", f"url(#{key}-")
    tag = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--sans)", tag)
    for tint in TINTS:
        tag = tag.replace(f": {tint.light}", f": var({tint.variable})")
    return tag


def _svg(figure: Figure) -> str:
    target = BytesIO()
    with house_style():
        figure.savefig(target, format="svg", metadata=_NO_METADATA)
    return target.getvalue().decode("utf-8")


def save_files(drawing: Drawing, folder: Path) -> tuple[Path, Path]:
    """Write the drawing with title and caption as KEY.svg and KEY.png; returns both paths."""
    paths = folder / f"{drawing.key}.svg", folder / f"{drawing.key}.png"
    with house_style(), _framed(drawing) as figure:
        png = BytesIO()
        save_svg(figure, paths[0])
        figure.savefig(png, format="png", facecolor=CARD.light, dpi=PNG_DOTS_PER_INCH)
    write_bytes(paths[1], png.getvalue())
    return paths


@contextmanager
def _framed(drawing: Drawing) -> Iterator[Figure]:
    """The figure with a band for the title above and one for the caption below, then as before."""
    figure = drawing.figure
    title, caption = textwrap.fill(drawing.title, 51), textwrap.fill(drawing.caption, 81)
    width, height = (float(length) for length in figure.get_size_inches())
    above = 0.16 + 0.19 * (title.count("\n") + 1)
    below = 0.16 + 0.15 * (caption.count("\n") + 1)
    whole = above + height + below
    # The layout is made for the body alone, frozen, and moved: the engine would put a legend
    # above the axes into the title.
    figure.draw_without_rendering()
    engine = figure.get_layout_engine()
    figure.set_layout_engine("none")
    figure.set_size_inches(width, whole)
    for axes in figure.axes:
        left, bottom, wide, high = axes.get_position().bounds
        axes.set_position((left, (below + bottom * height) / whole, wide, high * height / whole))
    for legend in figure.legends:
        legend.set_bbox_to_anchor((0, below / whole, 1, height / whole), figure.transFigure)
    left = 0.1 / width
    texts = (
        figure.text(left, 1 - 0.1 / whole, title, va="top", fontsize=11.5, fontweight="bold"),
        figure.text(left, 0.1 / whole, caption, va="bottom", fontsize=7.8, color=SOFT.light),
    )
    try:
        yield figure
    finally:
        for text in texts:
            text.remove()
        figure.set_size_inches(width, height)
        for legend in figure.legends:
            legend.set_bbox_to_anchor(None)
        for axes in figure.axes:
            axes.set_in_layout(True)  # set_position took them out
        figure.set_layout_engine(engine)
