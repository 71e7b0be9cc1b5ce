"""All figures of a report, in the order of the page.

A figure is a file here (or a function beside a kindred one) that ends in a `Spec`, and a line in
`FIGURES`; the page, the files and the gallery iterate over that table.
"""

from pathlib import Path

from etr.report.chart import Drawing, Skipped, save_files
from etr.report.figures import (
    capacity,
    clusters,
    difference,
    dropping,
    expert_load,
    experts,
    gains_and_costs,
    load_distribution,
    loss,
    loss_by_domain,
    memory,
    routed_text,
    scores,
    time,
    token_correlation,
    traffic,
)
from etr.report.results import Results
from etr.report.sources import ReportLike, load_report
from etr.report.spec import Missing, Spec

FIGURES: tuple[Spec, ...] = (
    difference.SPEC,
    loss.BY_STEPS,
    gains_and_costs.SPEC,
    loss_by_domain.SPEC,
    loss.BY_COMPUTE,
    loss.PERPLEXITY,
    dropping.DROP_RATE,
    dropping.WITHOUT_EXPERT,
    dropping.KEPT_MASS,
    capacity.FACTOR,
    capacity.LOWER_BOUND,
    expert_load.SPEC,
    load_distribution.DISTRIBUTION,
    load_distribution.UTILISATION,
    routed_text.SPEC,
    clusters.SPEC,
    scores.TRAINED,
    scores.TRAINING,
    token_correlation.SPEC,
    experts.BY_DOMAIN,
    experts.SIMILARITY,
    time.STEP_TIME,
    time.SPLIT,
    time.OPERATORS,
    memory.SPEC,
    traffic.SPEC,
)


def draw_figures(source: ReportLike) -> list[Drawing | Skipped]:
    """Draw every figure; one that lacks its data comes back as `Skipped` with the reason.

    Raises:
        FileNotFoundError, ValueError: as `load_report`.
    """
    results = load_report(source).results
    return [draw(spec, results) for spec in FIGURES]


def draw(spec: Spec, results: Results) -> Drawing | Skipped:
    """Draw one figure of the table."""
    alone = spec.compares and len(results.names) == 1
    found = Missing("one run alone has nothing to compare") if alone else spec.draw(results)
    if isinstance(found, Missing):
        return Skipped(key=spec.key, title=spec.title, reason=found.reason)
    own = {"key": spec.key, "section": spec.section, "title": found.title or spec.title}
    return Drawing(**(vars(found) | own))


def write_figures(source: ReportLike, folder: Path) -> list[Path]:
    """Write every figure that can be drawn as SVG and PNG into `folder`.

    Raises:
        FileNotFoundError, ValueError: as `load_report`.
    """
    drawings = [drawing for drawing in draw_figures(source) if isinstance(drawing, Drawing)]
    return [path for drawing in drawings for path in save_files(drawing, folder)]
