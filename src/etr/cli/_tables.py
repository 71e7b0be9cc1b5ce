"""Tables for the terminal, in which names give way to numbers where there is little room."""

from __future__ import annotations

import textwrap
from collections.abc import Container

from rich import box
from rich.table import Table

WIDEST = 12
"""Characters of a heading over numbers; a longer one takes several lines."""


def make_table(*names: str, words: Container[str] = (), title: str | None = None) -> Table:
    """A table without rows.

    Args:
        names: of the columns. Those in `words` hold text, which folds over several lines where the
            terminal is narrow; others hold numbers, which never break.
        title: above it.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    for name in names:
        if name in words:
            table.add_column(name, overflow="fold")
        else:
            heading = "\n".join(textwrap.wrap(name, WIDEST))
            table.add_column(heading, justify="right", no_wrap=True)
    return table
