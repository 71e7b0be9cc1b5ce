import base64
import copy
import csv
import io
import json
import math
import re
import struct
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invented_results import make_results
from numpy.testing import assert_allclose

from etr.report import draw_figures, load_results
from etr.report.chart import Drawing, Skipped, page_spec, page_svg, save_files
from etr.report.curves import (
    Curve,
    VariantCurves,
    gather,
    mean_curve,
    smooth,
    thin,
    train_curve,
)
from etr.report.figures import FIGURES
from etr.report.figures.expert_load import draw_expert_load, relative_load
from etr.report.histogram import Histogram, mean_histogram
from etr.report.labels import LINE, NAME, label_places
from etr.report.lines import line_chart, log_ticks, values_domain
from etr.report.page import PAGES
from etr.report.results import Results
from etr.report.spec import SECTIONS, Missing, Plot
from etr.report.style import CARD, INK, SERIES, SOFT, looks
from etr.report.svg import page_slim, slim
from etr.report.wording import clipped_inside

KEYS = [spec.key for spec in FIGURES]


def test_the_table_names_each_figure_once_in_the_order_of_the_sections() -> None:
    assert len(set(KEYS)) == len(KEYS)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key) for key in KEYS)
    assert len({spec.title for spec in FIGURES}) == len(KEYS)
    places = [SECTIONS.index(spec.section) for spec in FIGURES]
    assert places == sorted(places)
    assert set(places) == set(range(len(SECTIONS)))


@pytest.fixture(scope="module")
def results(comparison: Path) -> Results:
    return load_results(comparison)


@pytest.fixture(scope="module")
def figures(results: Results) -> dict[str, Drawing | Skipped]:
    return {figure.key: figure for figure in draw_figures(results)}


def test_every_figure_is_drawn_with_title_units_and_caption(
    figures: dict[str, Drawing | Skipped],
) -> None:
    assert list(figures) == KEYS
    for figure in figures.values():
        assert isinstance(figure, Drawing)
        assert figure.title
        assert figure.caption.endswith(".")
        assert figure.html or _titles(figure.chart)
        lines = list(csv.reader(io.StringIO(figure.numbers.csv())))
        assert len(lines) == len(figure.numbers.rows) + 1 > 1


def test_a_slim_picture_is_the_same_picture() -> None:
    """Groups nest as before, whatever was left out; what a clip needs stays, and text."""
    cell = '<path d="M{0},0h1v1h-1Z" fill="rgb(160, 9, {1})"/>'
    cells = "".join(cell.format(place, 8 * (place % 2)) for place in range(10))
    svg = (
        '<svg><defs><clipPath id="a"><path d="M0,0h9v9h-9Z"/></clipPath></defs><g class="r">'
        '<g class="e"/><g transform="translate(0,0)"><path d="M0,0h9v9h-9Z"/><g x="1.500"><g></g>'
        f'<text y="1.2345">1.2345 &lt;g&gt;</text></g>{cells}</g><path d="" display="none"/></g>'
        '<text opacity="0">none</text><line x2="0" y2="4" opacity="0"/><line x2="0" y2="4"/>'
        '<path d="M1.26,-2L3,4.04L2.5,4.04L2.5,4.04L1,4.04L3,4.04M0,1L0.26,0Z" stroke="var(--a)"/>'
        '<text transform="translate(1.5,2)">a</text><text transform="translate(1,2)">'
        '<tspan x="0">b</tspan></text><text transform="translate(1,2) rotate(9)">c</text></svg>'
    )
    even, odd = ("".join(f"M{at},0.5h1" for at in range(start, 10, 2)) for start in (0, 1))
    assert slim(svg) == (
        '<svg font-size="11px"><defs><clipPath id="a"><path d="M0,0h9v9h-9Z"/></clipPath></defs>'
        '<g x="1.5"><text y="1.23">1.2345 &lt;g&gt;</text></g>'
        f'<path d="{even}" stroke="#a00800" stroke-width="1"/>'
        f'<path d="{odd}" stroke="#a00808" stroke-width="1"/>'
        '<line y2="4"/><path d="M1.3-2l1.7,6-2,0 2,0M0,1l.3-1Z" stroke="var(--a)"/>'
        '<text x="1.5" y="2">a</text><text transform="translate(1,2)"><tspan x="0">b</tspan></text>'
        '<text transform="translate(1,2) rotate(9)">c</text></svg>'
    )


def _cells(columns: int, rows: int) -> str:
    return "".join(
        f'<path d="M{2.34 * x:.2f},{5 * y}h2.34v5h-2.34Z" fill="rgb({8 * x}, {16 * y}, 0)"/>'
        for y in range(rows)
        for x in range(columns)
    )


def test_a_grid_of_cells_is_an_image_in_a_page() -> None:
    """A pixel for each, in its place and colour; what is not a whole grid stays paths."""
    grid = page_slim(f"<svg>{_cells(5, 3)}</svg>")
    (image,) = ET.fromstring(grid)
    data = image.attrib.pop("href").partition("base64,")[2]
    assert image.attrib == {
        "x": "0",
        "y": "0",
        "width": "11.7",
        "height": "15",
        "preserveAspectRatio": "none",
        "style": "image-rendering:pixelated",
    }
    png = base64.b64decode(data)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        chunks[kind] = png[at + 8 : at + 8 + size]
        (check,) = struct.unpack(">I", png[at + 8 + size : at + 12 + size])
        assert check == zlib.crc32(kind + chunks[kind])
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert chunks[b"IHDR"] == struct.pack(">IIBBBBB", 5, 3, 8, 2, 0, 0, 0)
    assert zlib.decompress(chunks[b"IDAT"]) == b"".join(
        b"\0" + b"".join(bytes([8 * x, 16 * y, 0]) for x in range(5)) for y in range(3)
    )
    holed = _cells(5, 3).partition("/>")[2]
    assert "<image" not in page_slim(f"<svg>{holed}</svg>")
    assert "<image" not in slim(f"<svg>{_cells(5, 3)}</svg>"), "a file is a drawing throughout"


def test_texts_without_a_colour_are_those_that_the_page_colours() -> None:
    soft, own = '<text fill="var(--soft)">a</text>', '<text fill="var(--ink)">b</text>'
    assert (
        page_slim(f"<svg>{soft}{own}</svg>") == f'<svg font-size="11px"><text>a</text>{own}</svg>'
    )
    style = (PAGES / "report.css").read_text()
    assert ".plot text:not([fill]){fill:var(--soft)}" in style


def test_a_chart_has_what_its_picture_has_and_obeys_the_page(
    figures: dict[str, Drawing | Skipped],
) -> None:
    for figure in figures.values():
        assert isinstance(figure, Drawing)
        spec = page_spec(figure)
        assert spec["data"] == figure.chart["data"]
        assert spec["params"][0]["name"] == "hidden"
        assert all("variant" in record for record in spec["data"]["values"])
        assert figure.html or '"tooltip": [' in json.dumps(spec)


def test_marks_at_the_ends_of_an_axis_are_whole(figures: dict[str, Drawing | Skipped]) -> None:
    """Nothing is cut at the frame, and the 0 of an axis has no unit."""
    curves, panel = (figures[key] for key in ("loss-by-steps", "difference"))
    assert isinstance(curves, Drawing)
    assert isinstance(panel, Drawing)
    for encoding in (curves.chart["encoding"], panel.chart["spec"]["encoding"]):
        assert encoding["x"]["scale"]["padding"] ** 2 >= 40 / math.pi, "the area of a dot"
    svg = page_svg(curves, curves.wide)
    assert ">0G<" not in page_svg(figures["loss-by-compute"], False)
    first = min(float(x) for x in re.findall(r'transform="translate\(([\d.]+),[\d.]+\)" d="M', svg))
    assert first >= 4


def test_titles_state_what_the_data_decide(figures: dict[str, Drawing | Skipped]) -> None:
    assert re.fullmatch(
        r"linear 1\.1 ends 0\.0\d\d nats/token below baseline 1\.1", figures["loss-by-steps"].title
    )
    assert "etr mass 0.7 ends dropping 4" in figures["drop-rate"].title
    assert figures["loss-by-domain"].title == "Held-out loss by domain"


def test_captions_name_what_is_not_comparable_or_not_shown(
    figures: dict[str, Drawing | Skipped],
) -> None:
    captions = {k: f.caption for k, f in figures.items() if isinstance(f, Drawing)}
    for key in ("loss-by-steps", "loss-by-compute", "loss-by-domain", "gains-and-costs"):
        assert "(causality differs): expert choice." in captions[key]
    assert "Not shown, no values: expert choice." in captions["capacity-factor"]
    assert "Not shown, no scores: baseline 1.1." in captions["score-histograms"]


def _titles(entry: Any) -> list[str]:
    """Titles of all axes."""
    if isinstance(entry, list):
        return [title for one in entry for title in _titles(one)]
    if not isinstance(entry, dict):
        return []
    own = [entry["title"]] if entry.get("type") == "quantitative" and entry.get("title") else []
    return own + [t for key, one in entry.items() if key != "data" for t in _titles(one)]


def test_files_are_written_and_leave_the_drawing_as_it_was(
    figures: dict[str, Drawing | Skipped], tmp_path: Path
) -> None:
    drawing = figures["loss-by-steps"]
    assert isinstance(drawing, Drawing)
    before = copy.deepcopy(drawing.chart)
    svg, png = save_files(drawing, tmp_path / "figures")
    root = ET.parse(svg).getroot()
    assert root.tag.endswith("svg")
    words = " ".join("".join(element.itertext()) for element in root.iter())
    assert "moving mean" in words
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "var(--" not in svg.read_text()
    assert SERIES[0].light in svg.read_text()
    assert drawing.chart == before
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [png.name, svg.name]


@pytest.mark.parametrize(("steps", "name"), [(1, "etr mass 0.7"), (2, '$a$b$ <b>&" #0067b1 id=')])
def test_the_shortest_runs_and_names_with_marks_are_drawn(
    tmp_path: Path, steps: int, name: str
) -> None:
    content = make_results(tmp_path, seeds=1, steps=steps, variants=2, layers=1)
    content["rows"][1]["name"] = name
    figures = draw_figures(load_results(content, metrics_root=tmp_path))
    assert [figure.key for figure in figures if isinstance(figure, Drawing)] == KEYS
    for figure in figures:
        assert isinstance(figure, Drawing)
        root = ET.fromstring(page_svg(figure, figure.wide))
        words = ["".join(element.itertext()) for element in root.iter("text")]
        assert figure.key != "loss-by-steps" or clipped_inside(name, NAME) in words


def test_results_without_anything_skip_every_figure_with_a_reason(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=1, steps=1, variants=2)
    for row in content["rows"]:
        row |= {"metrics": None, "val_loss": None, "val_loss_by_domain": {}}
        row["affinity_histogram"] = None
    figures = draw_figures(content)
    assert [figure.key for figure in figures] == KEYS
    assert all(isinstance(figure, Skipped) and figure.reason for figure in figures)
    assert len({figure.title for figure in figures}) == len(FIGURES)


@pytest.mark.parametrize(
    ("layers", "shown"), [(None, [0, 2]), ([1], [1]), ([-1, 2], [2]), ([0, 1, 2], [0, 1, 2])]
)
def test_layers_of_the_load_can_be_chosen(results: Results, layers: Any, shown: list[int]) -> None:
    plot = draw_expert_load(results, layers)
    assert isinstance(plot, Plot)
    panels = plot.chart["facet"]["sort"]
    assert [panel for panel in panels if panel.startswith("baseline")] == [
        f"baseline 1.1, layer {layer}" for layer in shown
    ]


def test_the_numbers_of_the_load_have_every_seed_of_every_variant_shown(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("etr.report.figures.expert_load.MOST_RUNS", 3)
    plot = draw_expert_load(results)
    assert isinstance(plot, Plot)
    assert {(row[0], row[1]) for row in plot.numbers.rows} == {
        (name, seed) for name in results.names[:3] for seed in range(3)
    }


def test_a_layer_that_no_run_has_is_a_reason(results: Results) -> None:
    plot = draw_expert_load(results, [7])
    assert isinstance(plot, Missing)
    assert "[7]" in plot.reason


def test_relative_load_by_hand() -> None:
    choices = np.array([[1.0, 3.0], [3.0, 1.0], [0.0, 8.0], [0.0, 8.0]])
    assert_allclose(relative_load(choices, 2), [[1.0, 0.0], [1.0, 2.0]])
    assert_allclose(relative_load(np.zeros((3, 2))), np.zeros((2, 3)))


def test_mean_histogram_takes_only_equal_bins() -> None:
    edges, ones = np.array([0.0, 1.0]), np.ones(1)
    first = Histogram(edges=edges, own=ones, others=0 * ones)
    second = Histogram(edges=edges, own=3 * ones, others=ones)
    other = Histogram(edges=2 * edges, own=9 * ones, others=ones)
    found = mean_histogram([None, first, second, other])
    assert found is not None
    assert found.own.tolist() == [2.0]
    assert found.others.tolist() == [0.5]
    assert mean_histogram([None]) is None


def test_a_chart_of_lines_leaves_the_axis_it_is_given(results: Results) -> None:
    axis = {"title": "loss", "format": "~s"}
    variants = gather(results, train_curve("loss"))
    for log in (False, True):
        encoding = line_chart(results, variants, axis, (1.0, 9.0), log=log)["encoding"]
        assert encoding["y"]["title"] == "loss"
        assert encoding["y"]["axis"].keys() == {"format"} | ({"values"} if log else set())
    assert axis == {"title": "loss", "format": "~s"}


def _curve(x: list[float], y: list[float]) -> Curve:
    return Curve(x=np.array(x), y=np.array(y))


def test_mean_curve_of_runs_of_different_lengths_covers_what_they_share() -> None:
    same = mean_curve([_curve([1, 2], [1, 3]), _curve([1, 2], [3, 5])])
    assert same.y.tolist() == [2, 4]
    mixed = mean_curve([_curve([1, 2, 3, 4], [1, 2, 3, 4]), _curve([2, 3], [4, 5])])
    assert mixed.x.tolist() == [2, 3]
    assert mixed.y.tolist() == [3, 4]
    apart = mean_curve([_curve([1, 2], [1, 1]), _curve([5, 6], [9, 9])])
    assert apart.y.tolist() == [1, 1]
    point = mean_curve([_curve([2], [1]), _curve([1, 2, 3], [5, 6, 7])])
    assert point.x.tolist() == [2]
    assert point.y.tolist() == [3.5]


def test_smoothing_keeps_lines_and_levels() -> None:
    x = np.arange(400.0)
    assert_allclose(smooth(Curve(x=x, y=0 * x + 2)).y, 2)
    assert_allclose(smooth(Curve(x=x, y=x)).y[5:-5], x[5:-5])
    noise = np.random.default_rng(0).standard_normal(400)
    assert smooth(Curve(x=x, y=noise)).y.std() < 0.5
    assert smooth(_curve([1], [7])).y.tolist() == [7]


@pytest.mark.parametrize("size", [1, 2, 799, 800, 801, 100_000])
def test_thinning_keeps_both_ends_and_the_limit(size: int) -> None:
    x = np.arange(float(size))
    thinned = thin(Curve(x=x, y=x), 800)
    assert thinned.x.size == min(size, 800)
    assert (thinned.x[0], thinned.x[-1]) == (0, size - 1)


def _luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("tint", "least"), [*((tint, 3.0) for tint in SERIES), (INK, 7.0), (SOFT, 4.5)]
)
def test_colours_stand_out_from_the_card(tint: Any, least: float, theme: str) -> None:
    ours, card = (_luminance(getattr(t, theme)) for t in (tint, CARD))
    contrast = (max(ours, card) + 0.05) / (min(ours, card) + 0.05)
    assert contrast >= least


def test_variants_look_different() -> None:
    found = looks(f"variant {index}" for index in range(60)).values()
    assert len({(look.tint, look.dashes, look.shape) for look in found}) == 60
    few = looks(f"variant {index}" for index in range(8)).values()
    assert len({look.tint for look in few}) == 8


def test_a_colour_belongs_to_a_name_not_to_a_place() -> None:
    names = ["etr", "baseline", "locmoe", "mine"]
    found = looks(names)
    assert looks(names[::-1]) == found
    assert {name: looks([name])[name] for name in names} == found
    assert found["baseline"].tint == SERIES[0]


def test_labels_stand_near_their_lines_and_never_over_one_another() -> None:
    ends = {f"v{place}": 100.0 for place in range(10)} | {"low": 240.0, "high": 2.0}
    places = label_places(ends, 250.0)
    apart = np.diff(sorted(places.values()))
    assert (apart >= LINE).all()
    assert (places["high"], places["low"]) == (2.0, 240.0)
    assert 0 <= min(places.values()) <= max(places.values()) <= 250
    full = label_places({str(place): 250.0 for place in range(20)}, 260.0)
    assert (min(full.values()), max(full.values())) == (13.0, 260.0)


@pytest.mark.parametrize(("low", "high"), [(1, 1000), (6.2, 6.9), (95, 460), (0.02, 0.021)])
def test_logarithmic_axes_have_several_marks(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert 3 <= len(ticks) <= 12
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(ticks)


def test_a_steep_start_does_not_flatten_a_line() -> None:
    y = np.array([90.0, *np.linspace(2, 1, 39)])
    line = VariantCurves(name="a", line=Curve(x=np.arange(40.0), y=y), points=())
    (low, high), told = values_domain([line])
    assert low < 1 < 1.8 < high < 3
    assert "cut" in told
    flat = VariantCurves(name="a", line=Curve(x=np.arange(40.0), y=y[1:].repeat(2)[:40]), points=())
    assert values_domain([flat])[1] == ""
    assert values_domain([flat], from_zero=True)[0][0] == 0
