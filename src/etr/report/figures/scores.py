"""Scores of chosen experts against those of all the others: of the trained router, and before."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from etr.report.figure import direct_label
from etr.report.histogram import Histogram, mean_histogram
from etr.report.lines import not_shown
from etr.report.matrices import MOST_RUNS, first_of_each, panels, too_many
from etr.report.observations import Diagnostics
from etr.report.results import Results, Row
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.style import SOFT, variant_style

_COLUMNS = ("run", "when", "score from", "score to", "density of chosen", "density of others")


def _trained(results: Results) -> Plot | Missing:
    found = [
        (index, name, histogram)
        for index, name in enumerate(results.names)
        if (histogram := mean_histogram([row.histogram for row in results.of(name)]))
    ]
    if not found:
        return Missing(reason="no run has a histogram of its router's scores")
    figure, grid = panels(len(found), min(2, len(found)), 1.75, above=0.7)
    for axes, (index, name, histogram) in zip(grid.flat, found, strict=False):
        _draw_histogram(axes, histogram, variant_style(index).color)
        direct_label(axes, f"{name}: {histogram.apart} apart")
    _label(grid, len(found))
    return Plot(
        figure=figure,
        caption="Filled: scores of the experts that held-out tokens chose. Grey line: scores of all"
        " the others. Densities, mean over seeds, with the distance of the two means; scores of"
        " different routers have different units."
        f"{not_shown(results, [name for _, name, _ in found], 'no scores')}",
        numbers=Numbers(
            columns=_COLUMNS,
            rows=[line for _, name, h in found for line in _lines(name, "trained", h)],
        ),
    )


def _before_and_after(row: Row) -> list[tuple[int, Histogram]] | None:
    """The last layer's histogram in the first and the newest diagnostics, with their steps."""
    rows = row.metrics.diagnostics if row.metrics else ()
    found = [(d.step, h) for d in rows if (h := _last_layer(d))]
    return ([found[0], found[-1]] if len(found) > 1 else found) or None


def _last_layer(diagnostics: Diagnostics) -> Histogram | None:
    return diagnostics.layers[-1].affinity if diagnostics.layers else None


def _training(results: Results) -> Plot | Missing:
    found = first_of_each(results, _before_and_after)
    if not found:
        return Missing(reason="no run has affinities in its diagnostics")
    shown = found[: MOST_RUNS // 2]
    figure, grid = panels(2 * len(shown), 2, 1.55, above=0.6)
    for line, run in zip(grid, shown, strict=True):
        for axes, (step, histogram) in zip(line, run.value, strict=False):
            _draw_histogram(axes, histogram, variant_style(run.index).color)
            direct_label(axes, f"{run.name}, step {step:,}")
        for axes in line[len(run.value) :]:
            axes.set_axis_off()
        for axes in line[1 : len(run.value)]:
            axes.set_xlim(line[0].get_xlim()) if axes.get_xlim() == line[0].get_xlim() else None
    _label(grid, 2 * len(shown))
    return Plot(
        figure=figure,
        caption="Scores at the last MoE layer, at the first and the newest diagnostics. Filled: of"
        " each token's own experts, those it chose. Grey line: of all other experts. Densities in"
        f" the router's own unit; first seed of each variant.{too_many(found)}"
        f"{not_shown(results, [run.name for run in found], 'no affinities')}",
        numbers=Numbers(
            columns=_COLUMNS,
            rows=[
                line
                for run in found
                for step, histogram in run.value
                for line in _lines(run.name, f"step {step}", histogram)
            ],
        ),
    )


def _draw_histogram(axes: Axes, histogram: Histogram, color: str) -> None:
    axes.stairs(histogram.others, histogram.edges, color=SOFT.light, linewidth=1.1)
    axes.stairs(histogram.own, histogram.edges, fill=True, color=color, alpha=0.3)
    axes.stairs(histogram.own, histogram.edges, color=color, linewidth=1.4)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _label(grid: Sequence[Sequence[Axes]], count: int) -> None:
    """Names of the axes, along the outer panels alone."""
    flat = [axes for line in grid for axes in line][:count]
    columns = len(grid[0])
    for place, axes in enumerate(flat):
        if place + columns >= count:
            axes.set_xlabel("score (the router's unit)")
        if place % columns == 0:
            axes.set_ylabel("density (1 / unit)")


def _lines(name: str, when: str, histogram: Histogram) -> list[tuple[object, ...]]:
    edges = [float(edge) for edge in histogram.edges]
    return [
        (name, when, low, high, float(own), float(others))
        for low, high, own, others in zip(
            edges[:-1], edges[1:], histogram.own, histogram.others, strict=True
        )
    ]


TRAINED = Spec(
    key="score-histograms",
    title="Router scores: chosen experts against the others",
    section="Specialisation",
    draw=_trained,
)
TRAINING = Spec(
    key="affinity-histograms",
    title="Affinities before and after training",
    section="Specialisation",
    draw=_training,
)
