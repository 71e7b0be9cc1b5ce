"""Correlation of tokens before and after training, ordered by the expert they chose."""

from matplotlib.colors import Normalize

from etr.report.figure import direct_label
from etr.report.lines import not_shown
from etr.report.matrices import (
    MOST_RUNS,
    color_scale,
    draw_matrix,
    first_of_each,
    panels,
    too_many,
)
from etr.report.observations import Diagnostics
from etr.report.results import Results, Row
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.style import LOAD_MAP


def _before_and_after(row: Row) -> list[Diagnostics] | None:
    rows = row.metrics.diagnostics if row.metrics else ()
    found = [d for d in rows if d.token_correlation is not None]
    return ([found[0], found[-1]] if len(found) > 1 else found) or None


def _draw(results: Results) -> Plot | Missing:
    found = first_of_each(results, _before_and_after)
    if not found:
        return Missing(reason="no run has correlations of tokens in its diagnostics")
    shown = found[: MOST_RUNS // 2]
    figure, grid = panels(2 * len(shown), 2, 1.95, above=0.4)
    for line, run in zip(grid, shown, strict=True):
        for axes, diagnostics in zip(line, run.value, strict=False):
            assert diagnostics.token_correlation is not None
            image = draw_matrix(axes, diagnostics.token_correlation, LOAD_MAP, Normalize(-1, 1))
            direct_label(axes, f"{run.name}, step {diagnostics.step:,}")
        for axes in line[len(run.value) :]:
            axes.set_axis_off()
        line[0].set_ylabel("token, by expert")
    bar = color_scale(figure, image, "correlation of features")
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    return Plot(
        figure=figure,
        caption="Correlation of every two tokens over their features at the last MoE layer's input,"
        " tokens ordered by the expert they chose, at the first and the newest diagnostics. Blocks"
        " along the diagonal are tokens of one expert that resemble each other. First seed of each"
        f" variant.{too_many(found)}{not_shown(results, [run.name for run in found])}",
        numbers=Numbers(
            columns=("run", "step", "token", "expert", "other token", "correlation"),
            rows=[
                (run.name, d.step, a, _expert(d, a), b, float(value))
                for run in found
                for d in run.value
                if d.token_correlation is not None
                for a, line in enumerate(d.token_correlation)
                for b, value in enumerate(line)
            ],
        ),
    )


def _expert(diagnostics: Diagnostics, token: int) -> int | None:
    experts = diagnostics.token_expert
    return experts[token] if token < len(experts) else None


SPEC = Spec(
    key="token-correlation",
    title="Correlation of tokens before and after training",
    section="Specialisation",
    draw=_draw,
)
