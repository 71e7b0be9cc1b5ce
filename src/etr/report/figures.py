"""All figures of a report, in the order of the page."""

from collections.abc import Callable
from pathlib import Path

from etr.report.curves import capacity_factor, drop_rate, loss_by_compute, loss_by_steps
from etr.report.figure import Drawing, Skipped, house_style, save_files
from etr.report.panels import expert_load, gains_and_costs, loss_by_domain, score_histograms
from etr.report.results import Results, ResultsLike, load_results

FIGURES: tuple[Callable[[Results], Drawing | Skipped], ...] = (
    gains_and_costs,
    loss_by_steps,
    loss_by_compute,
    loss_by_domain,
    drop_rate,
    capacity_factor,
    expert_load,
    score_histograms,
)


def draw_figures(results: ResultsLike) -> list[Drawing | Skipped]:
    """Draw every figure; one that lacks its data comes back as `Skipped` with the reason.

    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    results = load_results(results)
    with house_style():
        return [draw(results) for draw in FIGURES]


def write_figures(results: ResultsLike, folder: Path) -> list[Path]:
    """Write every figure that can be drawn as SVG and PNG into `folder`.

    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    drawings = [drawing for drawing in draw_figures(results) if isinstance(drawing, Drawing)]
    return [path for drawing in drawings for path in save_files(drawing, folder)]
