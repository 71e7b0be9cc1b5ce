"""Tables of the pages, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """A table in GitHub-flavoured Markdown, ending in a newline.

    Args:
        head: of the columns.
        rows: cells, written as they are; see `escape_markdown`.
        align: "l" for left or "r" for right, a letter a column; the last one holds for the rest.
            Empty: as the page's reader aligns it.
    """
    rules = "|" + "---|" * len(head)
    if align:
        marks = align.ljust(len(head), align[-1])
        rules = _line({"l": ":---", "r": "---:"}[mark] for mark in marks)
    return "\n".join([_line(head), rules, *map(_line, rows), ""])


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    for mark in "\\`*_[]<>|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split(None)) if "\n" in text or "\r" in text else text


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
