"""What a person sees while cases run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.cases import Case
from benchmarks.results import CaseResult
from benchmarks.tables import TextTable, case_table

HIDDEN = {"forward alone", "rounds", "peak", "quartiles"}
"""Columns that only the page has room for."""


class Screen:
    """A bar over cases; a table for each one that is done."""

    def __init__(self, console: Console, progress: Progress, total: int) -> None:
        self.console, self._progress = console, progress
        self._task = progress.add_task("", total=total, note="")

    def note(self, case: Case, text: str) -> None:
        """What happens inside a case."""
        self._progress.update(self._task, note=escape(f"{case.name}: {text}"))

    def case(self, case: Case, result: CaseResult, stored: bool) -> None:
        """A case is done."""
        self._progress.advance(self._task)
        if case.group == "layer" and not result.left_out:
            self.table(case_table(result))
        took = "stored" if stored else f"{result.took_seconds:.1f} s"
        took = f"left out: {result.left_out}" if result.left_out else took
        self.console.print(f"{case.name}: {took}", highlight=False, markup=False)

    def table(self, table: TextTable, hidden: set[str] = HIDDEN) -> None:
        """Print a table."""
        shown = [i for i, column in enumerate(table.columns) if column not in hidden]
        drawn = Table(title=escape(table.title), box=box.SIMPLE_HEAD, title_justify="left")
        for i in shown:
            drawn.add_column(escape(table.columns[i]), justify="left" if i == 0 else "right")
        for row in table.rows:
            drawn.add_row(*(escape(row[i]) for i in shown))
        self.console.print(drawn)
        for note in table.notes:
            self.console.print(f"  no time for {note}", highlight=False, markup=False)


@contextmanager
def screen(total: int) -> Iterator[Screen]:
    """Show progress while the block runs."""
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=160)
    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Screen(console, progress, total)
