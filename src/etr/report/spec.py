"""What a figure of the report is: one entry of a table, and what its function gives back."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from etr.report.results import Results

Chart = dict[str, Any]
"""A Vega-Lite specification."""
Section = Literal["Quality", "Dropping", "Load", "Text", "Specialisation", "Time and memory"]
# What makes a spreadsheet compute a cell; full-width signs count as well.
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
BREAKS = ("\t", "\n")
SECTIONS: tuple[Section, ...] = get_args(Section)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a figure draws, as a table."""

    columns: tuple[str, ...]
    """Headings, with units."""
    rows: Sequence[tuple[Any, ...]]
    """One tuple per line; None and values that are not finite are written as nothing, and a text
    that a spreadsheet would take for a formula with an apostrophe before it."""

    def csv(self, *, by_columns: bool = False) -> str:
        """The table as comma-separated values, headings first; or a line for each column, which
        packs into half."""
        target = io.StringIO()
        writer = csv.writer(target, lineterminator="\n")
        rows = [self.columns, *self.rows]
        lines = zip(*rows, strict=True) if by_columns else rows
        writer.writerows([_written(value) for value in line] for line in lines)
        return target.getvalue()


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure that the data allow."""

    chart: Chart
    """The specification, without width, title and caption."""
    caption: str
    """What it shows and how it is computed."""
    numbers: Numbers
    """What it draws."""
    title: str | None = None
    """The finding, where the data decide one; None for the title of the table's entry."""
    wide: bool = False
    """Whether it takes a whole row of the page."""
    html: str | None = None
    """What a page shows in place of the chart; None for the chart."""


@dataclass(frozen=True)
class Missing:
    """A figure that the data do not allow."""

    reason: str
    """What is missing; completes a sentence."""


@dataclass(frozen=True)
class Spec:
    """One entry in the table of figures."""

    key: str
    """Name of its files and of its place in the page: lower case, digits and dashes."""
    title: str
    """What is shown."""
    section: Section
    """Where in the page."""
    draw: Callable[[Results], Plot | Missing]
    """Draws it from runs."""
    compares: bool = False
    """Whether it says nothing about one run alone."""


def _written(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    if isinstance(value, str):
        value = value.replace("\r\n", "\n").replace("\r", "\n")  # the writer quotes "\n" alone
        return f"'{value}" if value.strip().startswith(FORMULA) or value[:1] in BREAKS else value
    return "" if value is None else value
