"""The page in a real browser: what a reader sees, in both themes, at a desk and on a phone."""

from pathlib import Path

import pytest
from browser import NAMES, WIDTHS, Seen, find_chromium, look
from invented_results import make_results

from etr.report import FIGURES, write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_chromium() is None,
        reason=f"no browser: none of {', '.join(NAMES)} is on PATH;"
        " tests/report/install_chromium.sh installs one",
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    make_results(folder, seeds=1, steps=20, variants=3, layers=2)
    return write_report(folder, folder / "report.html")


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(
    page: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Seen:
    assert page.stat().st_size < 5e6
    found = look(page, request.param, tmp_path_factory.mktemp("scratch"))
    dark = {"light": False, "dark": True}[request.param]
    for frame in found.frames.values():  # the theme is the one asked for
        assert (int(frame["background"].split("(")[1].split(",")[0]) < 128) is dark
    return found


def test_the_console_stays_empty_and_nothing_is_requested(seen: Seen) -> None:
    assert seen.console == ()
    assert all(frame["requests"] == [] for frame in seen.frames.values())


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_is_seen_whole(seen: Seen, width: int) -> None:
    frame = seen.frames[width]
    assert [figure["key"] for figure in frame["figures"]] == [spec.key for spec in FIGURES]
    for figure in frame["figures"]:
        assert figure["visible"], figure
        assert 0 <= figure["left"] < figure["right"] <= width, figure
        assert figure["width"] >= 300, figure
        assert figure["height"] >= 80, figure
    assert frame["document_width"] <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_every_text_can_be_read(seen: Seen, width: int) -> None:
    assert seen.frames[width]["pale"] == []
    assert seen.frames[width]["smallest"] >= 7.5


def test_the_examination_finds_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!DOCTYPE html><body style='background:#fff;width:2000px'>"
        "<p style='color:#999'>pale</p><p style='color:#333;font-size:5px'>small</p>"
        "<figure id='gone' style='visibility:hidden'><svg width='400' height='9'></svg></figure>"
        "<img src='https://report.invalid/x.png'><script>console.error('wrong')</script>"
    )
    found = look(page, "light", tmp_path / "scratch", widths=(390,))
    frame = found.frames[390]
    assert [text for text, *_ in frame["pale"]] == ["pale"]
    assert frame["smallest"] == 5
    assert frame["document_width"] > 390
    assert [figure["visible"] for figure in frame["figures"]] == [False]
    assert frame["requests"] == ["https://report.invalid/x.png"]
    assert any("wrong" in line for line in found.console)
