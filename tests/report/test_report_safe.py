"""Texts of runs where a program reads them: spreadsheets, pages, terminals."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from invented_results import make_results, write_results
from invented_rows import alarm
from rich.console import Console

from etr.cli._progress import training_progress
from etr.prose import prose_html, prose_text
from etr.report import draw_figures, load_results, write_report
from etr.report.chart import Drawing
from etr.report.spec import Numbers

FORMULAS = ("=1+1", "+1", "-cmd|'/c calc'!A0", "@SUM(A1)", "\t=1", "\n=1", " =1", "\uff1d1")


@pytest.mark.parametrize("text", FORMULAS)
def test_no_text_of_a_table_is_a_formula(text: str) -> None:
    found = Numbers(columns=("run", text), rows=[(text, -0.5), ("a=b", -3), ("", None)]).csv()
    rows = list(csv.reader(io.StringIO(found, newline="")))
    assert rows == [["run", f"'{text}"], [f"'{text}", "-0.5"], ["a=b", "-3"], ["", ""]]


@pytest.mark.parametrize("text", ["a\r=1", "a\r\n=1", "a\n=1", 'a"\r=1'])
def test_no_text_begins_a_row(text: str) -> None:
    """A bare carriage return ends a line for some readers, and is not quoted for it."""
    found = Numbers(columns=("run",), rows=[(text,)]).csv()
    assert "\r" not in found
    head = text[: -len("\r=1")].rstrip("\r")
    assert list(csv.reader(io.StringIO(found, newline=""))) == [["run"], [f"{head}\n=1"]]


def test_names_of_variants_are_no_formulas_in_the_tables_of_a_page(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=1, steps=8, variants=2, layers=1)
    for row in content["rows"]:
        row["name"] = f"=cmd {row['name']}"
    drawn = [
        f
        for f in draw_figures(load_results(content, metrics_root=tmp_path))
        if isinstance(f, Drawing)
    ]
    named = 0
    for figure in drawn:
        for row in csv.reader(io.StringIO(figure.numbers.csv(), newline="")):
            named += any(cell.startswith("'=cmd") for cell in row)
            for cell in row:
                assert not cell.startswith(("=", "+", "@")), (figure.key, cell)
                assert not cell.startswith("-") or float(cell) < 0
    assert named


SAID = "keeps 50 % <of> choices; `etr calibrate` or `a & b` sets them"


def test_backticks_are_code_in_a_page() -> None:
    want = "keeps 50 % &lt;of&gt; choices; <code>etr calibrate</code> or <code>a &amp; b</code> "
    assert prose_html(SAID) == f"{want}sets them"
    assert prose_html("one ` alone, and ``") == "one ` alone, and ``"


def test_backticks_are_bold_in_a_terminal() -> None:
    text = prose_text(SAID)
    assert text.plain == SAID.replace("`", "")
    assert [(text.plain[s.start : s.end], s.style) for s in text.spans] == [
        ("etr calibrate", "bold"),
        ("a & b", "bold"),
    ]


def test_alarms_and_their_commands_on_the_page(tmp_path: Path, few: int) -> None:
    content = make_results(tmp_path, seeds=1, steps=8, variants=1, layers=1)
    path, row = write_results(tmp_path, content), content["rows"][0]
    with (tmp_path / row["metrics"]).open("a") as file:
        file.write(json.dumps(alarm(8) | {"message": SAID}) + "\n")
    page = write_report(path, tmp_path / "r.html").read_text()
    assert "<code>etr calibrate</code> or <code>a &amp; b</code> sets them." in page
    assert "`" not in page[page.index('id="alarms"') : page.index('id="undecided-0"')]


def test_alarms_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup either."""
    with training_progress(8) as progress:
        progress.step("run", alarm(8) | {"message": f"{SAID} [/red]"})
    assert "ALARM keeps 50 % <of> choices; etr calibrate or a & b sets them [/red]" in (
        capsys.readouterr().out
    )


def test_alarms_of_a_watched_run(tmp_path: Path) -> None:
    from etr.report.dashboard import dashboard
    from etr.report.live import LiveRun

    (tmp_path / "metrics.jsonl").write_text(json.dumps(alarm(8) | {"message": SAID}) + "\n")
    run = LiveRun(folder=tmp_path)
    run.poll()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(dashboard([run], run, now=0.0, width=200, height=60))
    assert "etr calibrate or a & b sets them" in console.export_text()
