"""Figures of lines over training, one per variant: what all of them share."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from etr.report.curves import (
    CurveOf,
    VariantCurves,
    gather,
    mean_curve,
    smooth,
    thin,
)
from etr.report.figure import add_legend, new_figure
from etr.report.results import Results
from etr.report.spec import Missing, Numbers, Plot
from etr.report.wording import listed, short

MOST_POINTS = 800
# All lines of a figure together, so that many variants do not make a page of many megabytes.
MOST_POINTS_IN_ALL = 6_000
SMOOTHED = "mean over seeds, a moving mean over a fortieth of the steps, the raw mean faint"


def draw_lines(axes: Axes, variants: Sequence[VariantCurves], scale: float = 1.0) -> None:
    """Raw means faint, smoothed means on top, evaluations as markers."""
    most = min(MOST_POINTS, MOST_POINTS_IN_ALL // len(variants))
    for variant in variants:
        look = variant.style
        raw, line = thin(variant.line, most), thin(smooth(variant.line), most)
        axes.plot(raw.x / scale, raw.y, color=look.color, linewidth=0.5, alpha=0.28)
        axes.plot(
            line.x / scale,
            line.y,
            color=look.color,
            linestyle=look.linestyle,
            marker=look.marker if line.x.size == 1 else None,
            zorder=3,
        )
        if variant.points:
            mean = mean_curve(variant.points)
            axes.plot(
                mean.x / scale,
                mean.y,
                color=look.color,
                linestyle="none",
                marker=look.marker,
                markersize=4.8,
                markeredgewidth=0.0,
                zorder=4,
            )


def cut_start(axes: Axes, variants: Sequence[VariantCurves]) -> str:
    """Leave out the steep start, which would press what is compared into a few pixels.

    Returns:
        A sentence for the caption where something was cut, else nothing.
    """
    smoothed = [smooth(variant.line).y for variant in variants]
    held_out = [mean_curve(variant.points).y for variant in variants if variant.points]
    top = max(float(y[y.size // 8 :].max()) for y in (*smoothed, *held_out))
    whole = max(float(y.max()) for y in (*smoothed, *held_out))
    bottom = min(float(curve.y.min()) for v in variants for curve in (v.line, *v.points))
    if whole - bottom < 1.3 * (top - bottom) or top <= bottom:
        return ""
    room = 0.05 * (top - bottom)
    axes.set_ylim(bottom - room, top + room)
    return " The axis is cut above the steep start."


def label_steps(axes: Axes) -> None:
    """Steps along x."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("optimizer steps")


def log_values(axes: Axes) -> None:
    """A logarithmic vertical axis whose marks are few and written in full."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def not_shown(results: Results, shown: Sequence[str], what: str = "no values") -> str:
    """A sentence that names the variants a figure lacks; nothing where it has all."""
    missing = [name for name in results.names if name not in shown]
    return f" Not shown, {what}: {listed(missing)}." if missing else ""


def curve_numbers(results: Results, curves: dict[str, CurveOf], x: str = "step") -> Numbers:
    """Every run's curves, not averaged, smoothed or thinned: one line per point.

    Args:
        results: the runs.
        curves: by name with unit.
        x: name of what they run along.
    """
    return Numbers(
        columns=("run", "seed", "quantity", x, "value"),
        rows=[
            (row.name, row.seed, name, float(at), float(value))
            for name, pick in curves.items()
            for row in results.rows
            if (curve := pick(row))
            for at, value in zip(curve.x, curve.y, strict=True)
        ],
    )


def plot_curve(
    results: Results,
    pick: CurveOf,
    *,
    label: str,
    caption: str,
    lacking: str,
    write: Callable[[float], str] | None = None,
    from_zero: bool = True,
    headline: Callable[[Sequence[VariantCurves]], str | None] = lambda variants: None,
) -> Plot | Missing:
    """A figure of one quantity against steps, a line per variant.

    Args:
        results: the runs.
        pick: the quantity of one run.
        label: of the vertical axis, with unit.
        caption: what it shows and how it is computed, one sentence without its full stop.
        lacking: why there is no figure if no run has the quantity.
        write: how values of the axis are written.
        from_zero: whether the axis starts at 0.
        headline: the title where the lines decide one.
    """
    variants = gather(results, pick)
    if not variants:
        return Missing(reason=lacking)
    figure = new_figure()
    (axes,) = figure.axes
    draw_lines(axes, variants)
    if from_zero:
        axes.set_ylim(bottom=0)
    if write is not None:
        # Bound here: mypy knows that it is not None, the formatter is called later.
        written = write
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axes.set_ylabel(label)
    label_steps(axes)
    add_legend(figure, [(v.name, v.style) for v in variants], markers=False)
    return Plot(
        figure=figure,
        caption=f"{caption}; {SMOOTHED}.{not_shown(results, [v.name for v in variants])}",
        numbers=curve_numbers(results, {label: pick}),
        title=headline(variants),
    )
