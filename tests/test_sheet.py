"""Tables of the pages, in Markdown."""

from __future__ import annotations

from etr.sheet import escape_markdown, table


def test_a_table_has_one_line_a_row() -> None:
    assert table(("a", "b"), [["1", 2]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"


def test_the_last_letter_aligns_the_columns_that_are_left() -> None:
    rules = table(("a", "b", "c"), [], "lr").splitlines()[1]
    assert rules == "| :--- | ---: | ---: |"


def test_markdown_in_a_text_is_shown_as_it_is() -> None:
    assert escape_markdown("a|b_c\n*d*") == r"a\|b\_c \*d\*"
