"""The page in a real browser: what a reader sees, in both themes, at a desk and on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import NAMES, WIDTHS, Seen, find_chromium, look
from invented_results import VARIANTS, make_results, many_variants

from etr.report import FIGURES, draw_figures, write_report
from etr.report.chart import Drawing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None,
        reason=f"no browser: none of {', '.join(NAMES)} is on PATH;"
        " tests/report/install_chromium.sh installs one",
    ),
]
KEYS = [spec.key for spec in FIGURES]
COMPARING = {spec.key for spec in FIGURES if spec.compares}
LONG = "a name of sixty letters, as a sweep over many options writes"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    make_results(folder, seeds=2, steps=20, variants=4, layers=2)
    return write_report(folder, folder / "report.html")


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(
    page: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Seen:
    found = look(page, request.param, tmp_path_factory.mktemp("scratch"))
    dark = {"light": False, "dark": True}[request.param]
    for frame in found.frames.values():  # the theme is the one asked for
        assert (int(frame["background"].split("(")[1].split(",")[0]) < 128) is dark
    return found


def check(frame: dict[str, Any], width: int) -> None:
    """What every page must hold at every width."""
    for figure in frame["figures"]:
        assert figure["visible"], figure
        assert 0 <= figure["left"] < figure["right"] <= width, figure
        assert figure["width"] >= 300, figure
        assert figure["least"] >= 159, figure
        assert figure["interactive"] or figure["key"] == "routed-text", figure
    assert frame["document_width"] <= width
    assert frame["overlaps"] == []
    assert frame["covered"] == []
    assert frame["pale"] == []
    assert frame["smallest"] >= 7.5
    assert frame["requests"] == []


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_are_whole_and_texts_can_be_read(seen: Seen, width: int) -> None:
    frame = seen.frames[width]
    check(frame, width)
    assert sorted(figure["key"] for figure in frame["figures"]) == sorted(KEYS)


def test_the_console_stays_empty(seen: Seen) -> None:
    assert seen.console == ()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_pointer_is_told_values(seen: Seen, width: int) -> None:
    told = seen.frames[width]["told"]
    assert {key for key, texts in told.items() if texts} == {*KEYS} - {"routed-text"}
    tips = [text for texts in told.values() for text in texts]
    assert all(any(letter.isdigit() for letter in text) for text in tips)
    names = [name for name, *_ in VARIANTS[:4]]
    for key in ("loss-by-steps", "drop-rate", "step-time", "memory"):
        assert all(any(name in text for text in told[key]) for name in names), (key, told[key])


@pytest.mark.parametrize("width", WIDTHS)
def test_a_hidden_variant_is_gone_from_all_figures(seen: Seen, width: int) -> None:
    left = seen.frames[width]["left"]
    assert len(left["before"]) >= len(FIGURES) - 6
    assert left["after"] == []
    assert left["again"] == left["before"]


def test_links_to_numbers_give_tables_of_rows(seen: Seen, page: Path) -> None:
    numbers = seen.frames[WIDTHS[0]]["numbers"]
    drawn = {figure.key: figure for figure in draw_figures(page.parent)}
    for key in ("loss-by-domain", "routed-text"):  # the other has quotes and ends of lines in it
        figure = drawn[key]
        assert isinstance(figure, Drawing)
        assert numbers[key] == figure.numbers.csv()


def test_sorting_sorts(seen: Seen) -> None:
    up, down = seen.frames[WIDTHS[0]]["sorted"]
    assert up == sorted(up)
    assert down == up[::-1]
    assert len(set(up)) == 4


@pytest.mark.parametrize("count", [1, 12, 60])
def test_pages_hold_from_one_variant_to_sixty(count: int, tmp_path: Path) -> None:
    many_variants(tmp_path, count, LONG if count == 12 else "")
    written = write_report(tmp_path, tmp_path / "report.html")
    widths = WIDTHS if count == 12 else WIDTHS[:1]
    found = look(written, "light", tmp_path / "scratch", widths=widths)
    assert found.console == ()
    for width, frame in found.frames.items():
        keys = {figure["key"] for figure in frame["figures"]}
        assert keys >= {"loss-by-steps", "drop-rate", "expert-load"}
        assert (keys & COMPARING == set()) is (count == 1)
        check(frame, width)


def test_the_examination_finds_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><body style='background:#fff;width:2000px'>"
        "<p style='color:#999'>pale</p><p style='color:#333;font-size:5px'>small</p>"
        "<figure id='gone' style='visibility:hidden'><div class='plot'>"
        "<svg width='400' height='90'><text y='20'>over</text><text x='3' y='22'>under</text></svg>"
        "</div></figure>"
        "<img src='https://report.invalid/x.png'><script>console.error('wrong')</script>"
    )
    found = look(page, "light", tmp_path / "scratch", widths=(390,))
    frame = found.frames[390]
    assert [text for text, *_ in frame["pale"]] == ["pale"]
    assert frame["smallest"] == 5
    assert frame["document_width"] > 390
    assert [figure["visible"] for figure in frame["figures"]] == [False]
    assert frame["overlaps"] == [["over", "under", "gone"]]
    assert frame["requests"] == ["https://report.invalid/x.png"]
    assert any("wrong" in line for line in found.console)
