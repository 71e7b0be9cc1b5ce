import base64
import csv
import gzip
import hashlib
import io
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from invented_results import make_results, write_results

from etr.report import FIGURES, draw_figures, load_results, write_report
from etr.report.chart import Drawing, page_svg
from etr.report.style import in_light
from etr.report.wording import TIMES

VOID = {"meta", "br", "link", "img", "input", "hr"}
SCRIPT = re.compile("<script.*?</script>", re.DOTALL)
# What shows a value by its colour: cells, and the stops of their legend; and the figures with them.
CELLS = re.compile(
    r'<path d="(?:M[^"Ml]+h[^"Ml]+)+" stroke="#\w{6}" [^>]*/>'
    r'|<stop offset="[\d.]+" stop-color="#\w{6}"/>'
)
HEATS = {"expert-load", "token-correlation", "expert-by-domain", "expert-similarity"}
# Elements of SVG that HTML lets close themselves.
SHAPES = {"stop", "g", "path", "use", "rect", "image", "line", "circle"}


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
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def held(source: str) -> dict[str, Any]:
    """What a page's script unpacks: the runtime of the charts, and their specifications."""
    (packed,) = re.findall(r'<script type="text/plain" id="charts">([^<]*)</script>', source)
    found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed)))
    return found


def assert_asks_for_nothing(page: Page, source: str) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base"}
        assert tag != "script" or set(attributes) in (set(), {"type", "id"})
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "action", "srcset", "data"} and tag != "a":
                assert re.match(r"#|data:image/png;base64,", str(value)), (tag, name, value)
    # What the scripts may fetch, the policy says: nothing. Which may run, it says by their hashes.
    rest = SCRIPT.sub("", re.sub(r"base64,[^\"]*", "", source))
    assert re.search(r"url\((?!#)|@import|//[a-z]", rest) is None
    policy = next(str(a["content"]) for _, a in page.tags if a.get("http-equiv"))
    assert policy.startswith(
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src"
    )
    allowed = re.findall(r"'sha256-([^']+)'", policy.partition("script-src")[2])
    run = [*re.findall(r"<script>(.*?)</script>", source, re.DOTALL), held(source)["runtime"]]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert digests == allowed
    assert "unsafe" not in policy.partition("script-src")[2]


@pytest.fixture(scope="module")
def report(comparison: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(comparison / "results.json", folder / "report.html")


def test_page_is_self_contained_and_small(report: Path) -> None:
    source = report.read_text()
    page = Page(source)
    assert_asks_for_nothing(page, source)
    assert report.stat().st_size < 1.4e6
    assert page.count("figure") == page.count("figcaption") == len(FIGURES)
    # The text view is text.
    assert sum("role" in a for tag, a in page.tags if tag == "svg") == len(FIGURES) - 1
    assert set(held(source)["charts"]) == {spec.key for spec in FIGURES} - {"routed-text"}
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
            "linear 1.1 ends 0.018 nats/token below baseline 1.1.",
            f"5 variants {TIMES} 3 seeds",
            "Results variant Δ baseline nats/token val loss",
            "What the numbers say",
            "What it gains",
            "Where it loses",
            "Quality Difference from baseline 1.1 over steps",
            "Dropping etr mass 0.7 ends dropping",
            "Load Load of every expert",
            "Text Which expert takes which token",
            "Alarms Collapsed expert: 3 runs etr schedule, seed 0 at step 120. No token reached",
            "Undecided Within noise",
            "Time and memory Step time over training",
            "How to reproduce Copy etr compare --recipe demo",
            "etr 0.1.0, commit 0123456789ab corpus 89abcdef01234567 python 3.11.9",
            "torch 2.13.0",
            "Full configuration",
        )
    ]
    assert places == sorted(places)
    assert "within noise" in text
    assert "not comparable" in text


def test_figures_lie_beside_the_page_if_asked(tmp_path: Path) -> None:
    results = load_results(make_results(tmp_path / "in", seeds=1, steps=1, variants=2, layers=1))
    page, folder = tmp_path / "out" / "report.html", tmp_path / "out" / "figures"
    drawn = set(shown_keys(write_report(results, page, figures_dir=folder)))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{key}.{kind}" for key in drawn for kind in ("svg", "png")
    )
    assert {"loss-by-domain", "gains-and-costs"} <= drawn
    beside = sorted(path.name for path in page.parent.iterdir())
    assert beside == ["figures", "report.html"]


def shown_keys(page: Path) -> list[str]:
    return [str(a["id"]) for tag, a in Page(page.read_text()).tags if tag == "figure"]


def test_numbers_are_in_the_page_as_links(report: Path) -> None:
    page = Page(report.read_text())
    links = {str(a["download"]): str(a["href"]) for _, a in page.tags if a.get("download")}
    assert set(links) == {f"{spec.key}.csv.gz" for spec in FIGURES}
    for link in links.values():
        head, _, packed = link.partition(",")
        assert head == "data:application/gzip;base64"
        text = gzip.decompress(base64.b64decode(packed)).decode()
        columns = list(csv.reader(io.StringIO(text, newline="")))
        assert {len(column) for column in columns} == {len(columns[0])}
        assert len(columns) > 1 < len(columns[0])


def test_alarms_stand_by_kind_and_the_best_row_is_marked(report: Path) -> None:
    source = report.read_text()
    assert source.count('<details class="card alarms">') == 1
    (best,) = re.findall(r'<td class="num best[^"]*"[^>]*>(.*?)</td>', source, re.DOTALL)
    assert "lowest" in best
    row = source[source.rindex("<tr data-variant", 0, source.index("num best")) :]
    assert row.startswith('<tr data-variant="linear 1.1">')


def test_rows_of_figures_are_full(report: Path) -> None:
    """Half a row never stands alone: two halves, or a whole."""
    for group in re.findall(r'<div class="figures">(.*?)</section>', report.read_text(), re.DOTALL):
        kinds = re.findall(r'<figure class="card( wide)?"', group)
        runs = "".join("w" if kind else "h" for kind in kinds).split("w")
        assert all(len(run) % 2 == 0 for run in runs), kinds


def test_pictures_are_valid_themed_alone_and_the_same_when_drawn_again(
    report: Path, comparison: Path
) -> None:
    source = report.read_text()
    for figure in draw_figures(comparison):
        assert isinstance(figure, Drawing)
        svg = page_svg(figure, figure.wide)
        root = ET.fromstring(svg)
        assert root.tag == "svg"
        assert root.get("aria-labelledby") == f"{figure.key}-title"
        assert "http" not in svg
        ids = re.findall(r' id="([^"]*)"', svg)
        assert all(name.startswith(f"{figure.key}-") for name in ids)
        assert set(re.findall(r"url\(#([^)]*)\)", svg)) <= set(ids)
        assert in_light(svg).count("var(--") == 0
        if figure.html is None:
            # All but cells of a load, and their legend, follows the page's theme.
            shown = CELLS.sub("", svg)
            colours = re.findall(r'(?:fill|stroke|color)(?:="|:) *([^";]+)', shown)
            assert all(c == "none" or c.startswith(("var(--", "url(#")) for c in colours), (
                figure.key
            )
            assert any(c.startswith("var(--") for c in colours)
            assert (shown != svg) is (figure.key in HEATS), figure.key
            # A half that stands alone is drawn whole in the page.
            assert svg in source or page_svg(figure, True) in source, figure.key


def test_the_same_results_give_the_same_page(tmp_path: Path, few: int) -> None:
    make_results(tmp_path, seeds=2, steps=5, variants=2, layers=1)
    first = write_report(tmp_path, tmp_path / "a" / "r.html").read_bytes()
    assert write_report(tmp_path, tmp_path / "b" / "r.html").read_bytes() == first


def test_a_mapping_finds_its_metrics_beside_the_page(tmp_path: Path, few: int) -> None:
    content = make_results(tmp_path, seeds=1, steps=3, variants=2, layers=1)
    source = write_report(content, tmp_path / "report.html").read_text()
    assert Page(source).count("figure") == few
    # One seed decides no loss, so no row is the best.
    assert "No difference in held-out loss is decided." in source
    assert "num best" not in source


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
    assert path.stat().st_size < 1.5e6


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
