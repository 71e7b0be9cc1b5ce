import csv
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from invented_results import make_results, write_results

from etr.report import FIGURES, load_results, write_report

VOID = {"meta", "br", "link", "img", "input", "hr"}
# Elements of SVG that HTML lets close themselves.
SHAPES = {"g", "path", "use", "rect", "image", "line", "circle"}


class Page(HTMLParser):
    """Collects what the tests ask of a page, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SHAPES
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def assert_asks_for_nothing(page: Page, source: str) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "action", "srcset", "data"} and tag != "a":
                assert re.match(r"#|data:image/png;base64,", str(value)), (tag, name, value)
    assert re.search(r"url\((?!#)|@import|//[a-z]", re.sub(r"base64,[^\"]*", "", source)) is None


@pytest.fixture(scope="module")
def report(comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(comparison / "results.json", folder / "report.html")


def test_page_is_self_contained_and_small(report: Path) -> None:
    source = report.read_text()
    page = Page(source)
    assert_asks_for_nothing(page, source)
    assert report.stat().st_size < 5e6
    assert page.count("figure") == page.count("figcaption") == len(FIGURES)
    # The text view is text.
    assert sum("role" in a for tag, a in page.tags if tag == "svg") == len(FIGURES) - 1
    assert page.count("s") > 5
    assert "prefers-color-scheme:dark" in source
    assert any(a.get("name") == "viewport" for tag, a in page.tags if tag == "meta")


def test_headings_descend_and_ids_are_unique(report: Path) -> None:
    page = Page(report.read_text())
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    references = {a["aria-labelledby"] for _, a in page.tags if a.get("aria-labelledby")}
    assert references <= set(ids)


def test_page_reads_from_table_to_command(report: Path) -> None:
    text = Page(report.read_text()).text
    places = [
        text.index(words)
        for words in (
            "Results variant",
            "What the numbers say",
            "What it gains",
            "Where it loses",
            "Alarms etr schedule, seed 0: collapsed expert at step 120. No token reached expert 3",
            "Figures Quality Time and memory",
            "What it gains and what it costs",
            "How to reproduce etr compare --recipe demo",
            "torch 2.13.0",
            "Full configuration",
        )
    ]
    assert places == sorted(places)
    assert "within noise" in text
    assert "not comparable" in text


def test_figures_lie_beside_the_page_if_asked(tmp_path: Path) -> None:
    results = load_results(make_results(tmp_path / "in", seeds=1, steps=1, variants=1, layers=1))
    page, folder = tmp_path / "out" / "report.html", tmp_path / "out" / "figures"
    drawn = set(shown_keys(write_report(results, page, figures_dir=folder)))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{key}.{kind}" for key in drawn for kind in ("svg", "png")
    )
    assert {"loss-by-domain", "gains-and-costs"} <= drawn
    beside = sorted(path.name for path in page.parent.iterdir())
    assert beside == ["figures", "report-data", "report.html"]


def shown_keys(page: Path) -> list[str]:
    return [str(a["id"]) for tag, a in Page(page.read_text()).tags if tag == "figure"]


def test_numbers_lie_beside_the_page_and_are_linked(report: Path) -> None:
    page = Page(report.read_text())
    links = [a["href"] for tag, a in page.tags if tag == "a" and "download" in a]
    assert links == [f"report-data/{spec.key}.csv" for spec in FIGURES]
    for link in links:
        with (report.parent / str(link)).open(newline="") as file:
            rows = list(csv.reader(file))
        assert len(rows) > 1
        assert {len(row) for row in rows} == {len(rows[0])}


def test_numbers_of_a_figure_that_is_gone_are_removed(tmp_path: Path, few: int) -> None:
    content = make_results(tmp_path, seeds=1, steps=2, variants=1, layers=1)
    write_report(content, tmp_path / "r.html")
    assert (tmp_path / "r-data" / "loss-by-domain.csv").exists()
    content["rows"][0]["val_loss_by_domain"] = {}
    write_report(content, tmp_path / "r.html")
    assert not (tmp_path / "r-data" / "loss-by-domain.csv").exists()


def test_the_same_results_give_the_same_page(tmp_path: Path) -> None:
    make_results(tmp_path, seeds=2, steps=5, variants=1, layers=1)
    first = write_report(tmp_path, tmp_path / "a" / "r.html").read_bytes()
    assert write_report(tmp_path, tmp_path / "b" / "r.html").read_bytes() == first


def test_a_mapping_finds_its_metrics_beside_the_page(tmp_path: Path, few: int) -> None:
    content = make_results(tmp_path, seeds=1, steps=3, variants=2, layers=1)
    page = Page(write_report(content, tmp_path / "report.html").read_text())
    assert page.count("figure") == few


def test_everything_is_escaped(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=1, steps=2, variants=2, layers=1)
    evil = '<script>alert("x")</script>'
    for row in content["rows"]:
        row["name"] += evil
        row["router"] = row["capacity"] = evil
        row["val_loss_by_domain"] = {evil: 1.0}
    content["command"] = f"etr compare {evil} \ud800"
    content["config"] = {evil: [evil]}
    content["environment"] = {evil: {evil: evil}}
    path = write_report(content, tmp_path / "report.html", title=evil)
    source = path.read_text()
    page = Page(source)
    assert_asks_for_nothing(page, source)
    assert page.text.count('<script>alert("x")') >= 5


def test_incomplete_results_give_a_page_with_reasons(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=2, steps=3, variants=3, layers=1)
    runs = [tmp_path / row["metrics"] for row in content["rows"]]
    runs[0].unlink()
    runs[1].write_bytes(runs[1].read_bytes()[:-40])
    runs[2].write_text("")
    content["rows"][3]["val_loss"] = None
    content["rows"][4]["step_time_seconds_median"] = float("nan")
    for row in content["rows"]:
        row["affinity_histogram"] = None
    page = Page(write_report(write_results(tmp_path, content), tmp_path / "r.html").read_text())
    assert "Not drawn: no run has a histogram of its router's scores." in page.text
    assert "runs/0-0/metrics.jsonl does not exist" in page.text
    assert "is cut and left out" in page.text
    assert "1 of 2 seeds" in page.text
    assert page.count("figure") == len(FIGURES) - 1
    assert " nan" not in page.text.lower()


def test_runs_of_different_lengths_and_sizes_share_a_page(tmp_path: Path) -> None:
    make_results(tmp_path, seeds=2, steps=30, variants=1)
    long = (tmp_path / "runs/0-1/metrics.jsonl").read_text()
    content = make_results(tmp_path, seeds=2, steps=7, variants=3, layers=1, experts=4)
    (tmp_path / "runs/0-1/metrics.jsonl").write_text(long)
    page = Page(write_report(content, tmp_path / "r.html").read_text())
    assert page.count("figure") == len(FIGURES)


def test_long_runs_stay_small(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=1, steps=1, variants=1)
    lines = (
        json.dumps({"kind": "train", "step": s, "loss": 2 + (s * 37 % 101) / 100, "drop_rate": 0.1})
        for s in range(1, 4_001)
    )
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    row: dict[str, Any] = content["rows"][0]
    content["rows"] = [{**row, "name": f"v{i}", "metrics": "long.jsonl"} for i in range(12)]
    path = write_report(content, tmp_path / "r.html")
    assert path.stat().st_size < 5e6


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    content = make_results(tmp_path, seeds=1, steps=1, variants=1, layers=1)
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr("etr.files.os.replace", fail)
    with pytest.raises(OSError, match="no room"):
        write_report(content, path)
    assert path.read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_loaded_results_are_taken_as_they_are(tmp_path: Path, few: int) -> None:
    make_results(tmp_path, seeds=1, steps=2, variants=2, layers=1)
    results = load_results(tmp_path)
    page = Page(write_report(results, tmp_path / "new" / "r.html", title="Mine").read_text())
    assert page.text.startswith("Mine")
    assert page.count("figure") == few
