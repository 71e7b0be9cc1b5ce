from io import StringIO
from pathlib import Path

import pytest
from invented_results import make_results
from rich.console import Console

from etr.report import markdown_table, results_markdown, terminal_table
from etr.report.table import escape_markdown
from etr.report.wording import (
    ABSENT,
    MINUS,
    clipped,
    clipped_inside,
    fixed,
    sentence,
    short,
    signed,
    significant,
)


def _printed(results: object, width: int = 100) -> str:
    target = StringIO()
    Console(file=target, width=width).print(terminal_table(results))  # type: ignore[arg-type]
    return target.getvalue()


def test_terminal_table_fits_100_columns_without_breaking_numbers(comparison: Path) -> None:
    text = _printed(comparison)
    assert all(len(line) <= 100 for line in text.splitlines())
    for number in (
        "97.0",
        "+3.5\N{NO-BREAK SPACE}pt",
        "6.00",
        "3.21 M",
        f"{MINUS}40.0",
        "within noise",
    ):
        assert number in text
    assert "…" not in text
    assert "not" in text
    assert "comparable" in text


def test_names_are_not_markup(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=1, steps=2, variants=1)
    content["rows"][0]["name"] = "[red]x[/red]"
    assert "[red]x[/red]" in _printed(content, width=200)


def test_absent_numbers_are_shown_as_absent(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=2, steps=2, variants=2)
    for row in content["rows"]:
        for key, value in row.items():
            if isinstance(value, float) or key in ("parameters", "active_parameters"):
                row[key] = None
    text = _printed(content)
    assert ABSENT in text
    assert "None" not in text
    assert "nan" not in text
    assert "None" not in markdown_table(content)


def test_markdown_table_is_rectangular_and_escaped(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=3, steps=2)
    for row in content["rows"]:
        if row["name"] == "linear 1.1":
            row["name"] = "a|b *c* <i>"
    lines = markdown_table(content).splitlines()
    assert len(lines) == 7
    pipes = {line.replace("\\|", "").count("|") for line in lines}
    assert pipes == {12}
    assert "a\\|b \\*c\\* \\<i\\>" in lines[3]


def test_escape_markdown_keeps_one_line() -> None:
    assert escape_markdown("a\n b_c") == "a b\\_c"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fixed(None, 2), ABSENT),
        (fixed(-1234.567, 1), f"{MINUS}1,234.6"),
        (fixed(-0.00001, 2), "0.00"),
        (signed(0.00001, 2), "0.00"),
        (signed(0.5, 2), "+0.50"),
        (significant(0.0012345), "0.00123"),
        (significant(0.9999), "1.00"),
        (significant(1234.5), "1,234"),
        (significant(0.0), "0.00"),
        (short(999.9), "1 k"),
        (short(1_234_567), "1.23 M"),
        (short(-2.5e12), f"{MINUS}2.5 T"),
        (short(12), "12"),
        (sentence("no load"), "No load."),
        (sentence("Why?"), "Why?"),
        (sentence(""), ""),
        (clipped("abcdefgh", 5), "abcd…"),
        (clipped_inside("abcdefgh", 5), "ab…gh"),
        (clipped_inside("abcdefgh", 6), "abc…gh"),
        (clipped_inside("abc", 3), "abc"),
    ],
)
def test_numbers_as_people_read_them(text: str, expected: str) -> None:
    assert text == expected


def test_results_markdown_holds_tables_verdicts_and_command(comparison: Path) -> None:
    text = results_markdown(comparison, "A demo", "make demo")
    assert text.startswith("<!-- Generated from results.json")
    assert "\n# A demo\n" in text
    assert "```sh\nmake demo\n```" in text
    assert "torch 2.13.0" in text
    assert "5 variants" in text
    assert "3 seeds (0, 1 and 2)" in text
    assert f"- **etr schedule**: expert compute per step {MINUS}28.0 %" in text
    assert "- **etr mass 0.7**: held-out loss +" in text
    assert "not comparable" in text
    assert "dropless" in text
    assert "\n\n\n" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_results_markdown_falls_back_to_the_recorded_command(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=1, steps=2, variants=1)
    content["command"] = "echo ```"
    text = results_markdown(content, "One", "")
    assert "````sh\necho ```\n````" in text
    assert "Nothing that more than one seed shows beyond noise." in text
