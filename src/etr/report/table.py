"""The comparison as a table for the terminal and for Markdown."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from etr.report.columns import COLUMNS, RUN_COLUMNS, Cell, Column, Tone
from etr.report.results import ResultsLike, load_results
from etr.report.summary import VariantSummary, summarize
from etr.sheet import escape_markdown, table

_STYLES: dict[Tone, str] = {
    "plain": "",
    "good": "green",
    "bad": "red",
    "quiet": "dim",
    "alarm": "yellow",
}


WIDE = 100
"""Columns of a terminal that has room for every column of the table."""


def terminal_table(results: ResultsLike, width: int = WIDE) -> Table:
    """The comparison, one row per variant.

    Args:
        results: the comparison.
        width: columns of the terminal; under 100, router and capacity are left out, which the
            variant's name and the report tell.
    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    results = load_results(results)
    summary = summarize(results)
    found = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    every = COLUMNS if results.is_comparison else RUN_COLUMNS
    columns = [c for c in every if width >= WIDE or c.header not in ("router", "capacity")]
    for column in columns:
        # Numbers never break; the three names take the room that is left.
        found.add_column(
            Text(column.brief or column.header),
            justify="right" if column.numeric else "left",
            no_wrap=column.numeric,
            overflow="fold",
        )
    for variant in summary.variants:
        found.add_row(*(_styled(column.cell(variant), column.numeric) for column in columns))
    return found


def _styled(cell: Cell, numeric: bool) -> Text:
    # Text, not markup: a name such as "[red]" is printed as it is.
    main = cell.text.replace(" ±", "\n±") if numeric else cell.text
    text = Text(main, style=_STYLES[cell.tone])
    if cell.detail:
        detail = cell.detail.replace(": ", ":\n").replace("not ", "not\n")
        text.append(f"\n{detail}", style="dim" if cell.tone == "plain" else "")
    return text


def markdown_table(results: ResultsLike) -> str:
    """The comparison as a GitHub-flavoured Markdown table, ending in a newline.

    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    return markdown_rows(COLUMNS, summarize(results).variants)


def markdown_rows(columns: Sequence[Column], variants: Sequence[VariantSummary]) -> str:
    """A Markdown table of some columns."""
    headers = [f"{c.header} ({c.unit})" if c.unit else c.header for c in columns]
    rows = [[_markdown_cell(column.cell(variant)) for column in columns] for variant in variants]
    return table(headers, rows, "".join("r" if column.numeric else "l" for column in columns))


def _markdown_cell(cell: Cell) -> str:
    text = escape_markdown(cell.text)
    return f"{text} ({escape_markdown(cell.detail)})" if cell.detail else text
