"""Loss against steps and against expert compute, and perplexity."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from etr.report.curves import Curve, CurveOf, VariantCurves, evaluation_curve, gather, train_curve
from etr.report.figure import add_legend, new_figure
from etr.report.lines import (
    curve_numbers,
    cut_start,
    draw_lines,
    label_steps,
    log_values,
    not_shown,
)
from etr.report.reading import headline
from etr.report.results import Results, Row
from etr.report.spec import Missing, Plot, Spec
from etr.report.style import SOFT
from etr.report.summary import causality_note, summarize
from etr.report.wording import prefix_of, short

_NO_LOSS = "no run has a training loss in its metrics"
_LABEL = "cross-entropy (nats/token)"


def _by_steps(results: Results) -> Plot | Missing:
    variants = gather(results, train_curve("loss"), evaluation_curve())
    if not variants:
        return Missing(reason=_NO_LOSS)
    figure = new_figure()
    (axes,) = figure.axes
    draw_lines(axes, variants)
    cut = cut_start(axes, variants)
    label_steps(axes)
    caption = (
        f"{_lines_caption(figure, axes, variants)}{cut}{_absent(results, variants)}"
        f"{causality_note(results)}"
    )
    return Plot(
        figure=figure,
        caption=caption,
        numbers=curve_numbers(results, _losses("step")),
        title=headline(summarize(results)),
    )


def _by_compute(results: Results) -> Plot | Missing:
    """The fair comparison where capacities differ."""
    pick = train_curve("loss", x="expert_flops")
    variants = gather(results, pick, evaluation_curve("expert_flops"))
    if not variants:
        return Missing(reason=_NO_LOSS)
    figure = new_figure()
    (axes,) = figure.axes
    ends = [float(variant.line.x[-1]) for variant in variants]
    scale, prefix = prefix_of(max(ends))
    draw_lines(axes, variants, scale)
    cut = cut_start(axes, variants)
    axes.axvline(min(ends) / scale, color=SOFT.light, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_xlabel(f"expert compute so far ({prefix}FLOP)")
    caption = (
        f"{_lines_caption(figure, axes, variants)} Compute counts kept tokens, forward and"
        f" backward. Dotted: the end of the thriftiest variant, {short(min(ends))}FLOP; others"
        f" have not finished their schedule there.{cut}{_absent(results, variants)}"
        f"{causality_note(results)}"
    )
    numbers = curve_numbers(results, _losses("expert_flops"), x="expert compute (FLOP)")
    return Plot(figure=figure, caption=caption, numbers=numbers)


def _perplexity(row: Row) -> Curve | None:
    curve = evaluation_curve()(row)
    # exp(20) is past anything that a vocabulary can reach.
    return curve and Curve(x=curve.x, y=np.exp(np.minimum(curve.y, 20.0)))


def _perplexity_by_steps(results: Results) -> Plot | Missing:
    variants = gather(results, _perplexity)
    if not variants:
        return Missing(reason="no run has a held-out loss in its metrics")
    figure = new_figure()
    (axes,) = figure.axes
    for variant in variants:
        look = variant.style
        axes.plot(
            variant.line.x,
            variant.line.y,
            color=look.color,
            linestyle=look.linestyle,
            marker=look.marker,
            markersize=4.8,
        )
    log_values(axes)
    axes.set_ylabel("held-out perplexity (log scale)")
    label_steps(axes)
    add_legend(figure, [(v.name, v.style) for v in variants])
    return Plot(
        figure=figure,
        caption="Exponential of the held-out loss per token, experts selected as served; mean over"
        f" seeds.{_absent(results, variants)}{causality_note(results)}",
        numbers=curve_numbers(results, {"held-out perplexity": _perplexity}),
    )


def _losses(x: str) -> dict[str, CurveOf]:
    return {
        "training loss (nats/token)": train_curve("loss", x=x),
        "held-out loss (nats/token)": evaluation_curve(x),
    }


def _absent(results: Results, variants: list[VariantCurves]) -> str:
    return not_shown(results, [variant.name for variant in variants])


def _lines_caption(figure: Figure, axes: Axes, variants: list[VariantCurves]) -> str:
    axes.set_ylabel(_LABEL)
    add_legend(figure, [(v.name, v.style) for v in variants])
    return (
        "Means over seeds. Lines: training loss, a moving mean over a fortieth of the steps, the"
        " raw mean faint. Markers: held-out loss, experts selected as served."
    )


BY_STEPS = Spec(key="loss-by-steps", title="Loss against steps", section="Quality", draw=_by_steps)
BY_COMPUTE = Spec(
    key="loss-by-compute",
    title="Loss at equal expert compute",
    section="Quality",
    draw=_by_compute,
)
PERPLEXITY = Spec(
    key="perplexity",
    title="Held-out perplexity",
    section="Quality",
    draw=_perplexity_by_steps,
)
