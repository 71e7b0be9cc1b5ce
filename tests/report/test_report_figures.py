import csv
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from invented_results import make_results
from numpy.testing import assert_allclose

from etr.report import draw_figures, load_results
from etr.report.curves import Curve, mean_curve, smooth, thin
from etr.report.figure import Drawing, Skipped, inline_svg, save_files
from etr.report.figures import FIGURES
from etr.report.figures.expert_load import draw_expert_load, relative_load
from etr.report.histogram import Histogram, mean_histogram
from etr.report.spec import SECTIONS, Missing, Plot
from etr.report.style import CARD, INK, SERIES, SOFT, variant_style

OVERLOADED = "#a03c00"  # a datum: the end of the load's colour map
KEYS = [spec.key for spec in FIGURES]


def test_the_table_names_each_figure_once_in_the_order_of_the_sections() -> None:
    assert len(set(KEYS)) == len(KEYS)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", key) for key in KEYS)
    assert len({spec.title for spec in FIGURES}) == len(KEYS)
    places = [SECTIONS.index(spec.section) for spec in FIGURES]
    assert places == sorted(places)
    assert set(places) == set(range(len(SECTIONS)))


@pytest.fixture(scope="module")
def figures(comparison: Path) -> dict[str, Drawing | Skipped]:
    return {figure.key: figure for figure in draw_figures(comparison)}


def test_every_figure_is_drawn_with_title_units_and_caption(
    figures: dict[str, Drawing | Skipped],
) -> None:
    assert list(figures) == KEYS
    for figure in figures.values():
        assert isinstance(figure, Drawing)
        assert figure.title
        assert figure.caption.endswith(".")
        labels = [axes.get_xlabel() + axes.get_ylabel() for axes in figure.figure.axes]
        assert any(labels) or figure.html
        lines = list(csv.reader(io.StringIO(figure.numbers.csv())))
        assert len(lines) == len(figure.numbers.rows) + 1 > 1


def test_inline_svg_is_valid_themed_and_alone(figures: dict[str, Drawing | Skipped]) -> None:
    seen: set[str] = set()
    for figure in figures.values():
        assert isinstance(figure, Drawing)
        svg = inline_svg(figure)
        root = ET.fromstring(svg)
        assert root.tag == "svg"
        ids = {element.get("id") for element in root.iter() if element.get("id")}
        assert not ids & seen
        seen |= {str(name) for name in ids}
        references = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg)
        assert references or figure.key == "routed-text"
        assert {a or b for a, b in references} <= ids
        assert "http" not in svg
        # A colour that is left over would not follow the page's theme.
        left = set(re.findall(r"(?:fill|stroke): (#\w+)", svg))
        if figure.html is None:
            ends_in_colour = figure.key in ("expert-load", "expert-by-domain")
            assert left <= ({OVERLOADED} if ends_in_colour else set())
        assert "var(--ink)" in svg or "var(--soft)" in svg


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


def test_files_are_written_and_leave_the_drawing_as_it_was(
    figures: dict[str, Drawing | Skipped], tmp_path: Path
) -> None:
    drawing = figures["loss-by-steps"]
    assert isinstance(drawing, Drawing)
    size, texts = drawing.figure.get_size_inches().tolist(), len(drawing.figure.texts)
    svg, png = save_files(drawing, tmp_path / "figures")
    root = ET.parse(svg).getroot()
    assert root.tag.endswith("svg")
    words = " ".join("".join(element.itertext()) for element in root.iter())
    assert "moving mean" in words
    assert png.read_bytes().startswith(b"\x89PNG")
    assert drawing.figure.get_size_inches().tolist() == size
    assert len(drawing.figure.texts) == texts
    assert all(legend.get_bbox_to_anchor() is not None for legend in drawing.figure.legends)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [png.name, svg.name]


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    draw_figures(make_results(tmp_path, seeds=1, steps=2, variants=1))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs_are_drawn(tmp_path: Path, steps: int) -> None:
    make_results(tmp_path, seeds=1, steps=steps, variants=2, layers=1)
    figures = draw_figures(tmp_path)
    assert [figure.key for figure in figures if isinstance(figure, Drawing)] == KEYS
    for figure in figures:
        assert isinstance(figure, Drawing)
        ET.fromstring(inline_svg(figure))


def test_results_without_anything_skip_every_figure_with_a_reason(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=1, steps=1, variants=2)
    for row in content["rows"]:
        row |= {"metrics": None, "val_loss": None, "val_loss_by_domain": {}}
        row["affinity_histogram"] = None
    figures = draw_figures(content)
    assert [figure.key for figure in figures] == KEYS
    assert all(isinstance(figure, Skipped) and figure.reason for figure in figures)
    assert len({figure.title for figure in figures}) == len(FIGURES)


def test_names_with_marks_of_formulas_and_markup_are_drawn(tmp_path: Path) -> None:
    content = make_results(tmp_path, seeds=1, steps=3, variants=2, layers=1)
    name = '$a$b$ <b>&" #0067b1 id='
    content["rows"][1]["name"] = name
    for figure in draw_figures(load_results(content, metrics_root=tmp_path)):
        assert isinstance(figure, Drawing)
        root = ET.fromstring(inline_svg(figure))
        words = ["".join(element.itertext()) for element in root.iter("text")]
        if figure.key == "loss-by-steps":
            assert name in words


@pytest.mark.parametrize(
    ("layers", "shown"), [(None, [0, 2]), ([1], [1]), ([-1, 2], [2]), ([0, 1, 2], [0, 1, 2])]
)
def test_layers_of_the_load_can_be_chosen(comparison: Path, layers: Any, shown: list[int]) -> None:
    plot = draw_expert_load(load_results(comparison), layers)
    assert isinstance(plot, Plot)
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in plot.figure.axes]
    assert [t for t in titles if t.startswith("baseline")] == [
        f"baseline 1.1, seed {seed}, layer {layer}" for seed in range(3) for layer in shown
    ]


def test_a_layer_that_no_run_has_is_a_reason(comparison: Path) -> None:
    plot = draw_expert_load(load_results(comparison), [7])
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
    looks = [variant_style(index) for index in range(64)]
    assert len({(look.color, look.dashes, look.marker) for look in looks}) == 64
    assert len({look.color for look in looks[:8]}) == 8
