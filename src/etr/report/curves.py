"""Figures of what changes while training: loss, dropping and capacity."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from etr.report.figure import Drawing, Skipped, add_legend, new_figure
from etr.report.metrics import Array
from etr.report.reading import headline
from etr.report.results import Results, Row
from etr.report.style import SOFT, LineStyle, variant_style
from etr.report.summary import causality_note, summarize
from etr.report.wording import TIMES, listed, percent, prefix_of, short

MOST_POINTS = 800
# All lines of a figure together, so that many variants do not make a page of many megabytes.
MOST_POINTS_IN_ALL = 12_000
SMOOTHING_SHARE = 40


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line, x ascending."""

    x: Array
    """Steps or FLOP."""
    y: Array
    """Values, all finite."""


def train_curve(row: Row, x: str, y: str) -> Curve | None:
    """One run's curve without the entries that lack a value; None if nothing is left."""
    if row.metrics is None:
        return None
    metrics = row.metrics
    xs = metrics.step.astype(np.float64) if x == "step" else metrics.train[x]
    return _clean(xs, metrics.train[y])


def evaluation_curve(row: Row, x: str) -> Curve | None:
    """Held-out loss of one run during training, selected as the row says."""
    if row.metrics is None:
        return None
    found = [e for e in row.metrics.evaluations if e.selection == row.selection]
    xs = [e.step if x == "step" else e.expert_flops for e in found]
    return _clean(
        np.array(xs, dtype=np.float64), np.array([e.val_loss for e in found], dtype=np.float64)
    )


def _clean(x: Array, y: Array) -> Curve | None:
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    order = np.argsort(x, kind="stable")
    return Curve(x=x[order], y=y[order]) if x.size else None


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean over seeds, over the range of x that all of them share.

    Seeds with the same x are averaged point by point, others are interpolated; where no range is
    shared, the first seed stands alone.
    """
    first = curves[0]
    if all(np.array_equal(curve.x, first.x) for curve in curves):
        return Curve(x=first.x, y=np.mean([curve.y for curve in curves], axis=0))
    start, end = max(c.x[0] for c in curves), min(c.x[-1] for c in curves)
    if start > end:
        return first
    longest = max(curves, key=lambda curve: curve.x.size)
    inside = longest.x[(longest.x > start) & (longest.x < end)]
    x = np.unique(np.concatenate([[start], inside, [end]]))
    return Curve(x=x, y=np.mean([np.interp(x, c.x, c.y) for c in curves], axis=0))


def smooth(curve: Curve) -> Curve:
    """Centred moving mean over a fortieth of the points; one-sided towards both ends."""
    size = curve.y.size
    reach, place = size // (2 * SMOOTHING_SHARE), np.arange(size)
    start, end = np.maximum(place - reach, 0), np.minimum(place + reach + 1, size)
    sums = np.concatenate([[0.0], np.cumsum(curve.y)])
    return Curve(x=curve.x, y=(sums[end] - sums[start]) / (end - start))


def thin(curve: Curve, most: int) -> Curve:
    """At most `most` points, the first and the last among them."""
    if curve.x.size <= most:
        return curve
    chosen = np.unique(np.linspace(0, curve.x.size - 1, most).round().astype(int))
    return Curve(x=curve.x[chosen], y=curve.y[chosen])


@dataclass(frozen=True, kw_only=True)
class VariantCurves:
    """One variant's lines in one figure."""

    name: str
    """The variant."""
    style: LineStyle
    """Its look."""
    line: Curve
    """Mean over seeds, not smoothed."""
    points: Sequence[Curve]
    """Evaluations, one curve per seed."""


def gather(results: Results, x: str, y: str, *, evaluations: bool = False) -> list[VariantCurves]:
    """The variants that have the curve."""
    found = []
    for index, name in enumerate(results.names):
        rows = results.of(name)
        lines = [curve for row in rows if (curve := train_curve(row, x, y))]
        points = [curve for row in rows if (curve := evaluation_curve(row, x))]
        if lines:
            found.append(
                VariantCurves(
                    name=name,
                    style=variant_style(index),
                    line=mean_curve(lines),
                    points=points if evaluations else (),
                )
            )
    return found


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


def _cut_start(axes: Axes, variants: Sequence[VariantCurves]) -> str:
    """Leave out the steep start, which would press what is compared into a few pixels."""
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


def _absent(results: Results, shown: Sequence[VariantCurves]) -> str:
    missing = [name for name in results.names if name not in {v.name for v in shown}]
    return f" Not shown, no values: {listed(missing)}." if missing else ""


def loss_by_steps(results: Results) -> Drawing | Skipped:
    """Loss against optimizer steps."""
    key, title = "loss-by-steps", "Loss against steps"
    variants = gather(results, "step", "loss", evaluations=True)
    if not variants:
        return Skipped(key=key, title=title, reason=_NO_LOSS)
    figure = new_figure()
    (axes,) = figure.axes
    draw_lines(axes, variants)
    cut = _cut_start(axes, variants)
    _label_steps(axes)
    caption = (
        f"{_loss_caption(figure, axes, variants)}{cut}{_absent(results, variants)}"
        f"{causality_note(results)}"
    )
    title = headline(summarize(results)) or title
    return Drawing(key=key, title=title, caption=caption, figure=figure)


def loss_by_compute(results: Results) -> Drawing | Skipped:
    """Loss against the expert compute spent: the fair comparison where capacities differ."""
    key, title = "loss-by-compute", "Loss at equal expert compute"
    variants = gather(results, "expert_flops", "loss", evaluations=True)
    if not variants:
        return Skipped(key=key, title=title, reason=_NO_LOSS)
    figure = new_figure()
    (axes,) = figure.axes
    ends = [float(variant.line.x[-1]) for variant in variants]
    scale, prefix = prefix_of(max(ends))
    draw_lines(axes, variants, scale)
    cut = _cut_start(axes, variants)
    axes.axvline(min(ends) / scale, color=SOFT.light, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_xlabel(f"expert compute so far ({prefix}FLOP)")
    caption = (
        f"{_loss_caption(figure, axes, variants)} Compute counts kept tokens, forward and backward."
        f" Dotted: the end of the thriftiest variant, {short(min(ends))}FLOP; others have not"
        f" finished their schedule there.{cut}{_absent(results, variants)}{causality_note(results)}"
    )
    return Drawing(key=key, title=title, caption=caption, figure=figure)


_NO_LOSS = "no run has a training loss in its metrics"


def _loss_caption(figure: Figure, axes: Axes, variants: Sequence[VariantCurves]) -> str:
    axes.set_ylabel("cross-entropy (nats/token)")
    add_legend(figure, [(v.name, v.style) for v in variants])
    return (
        "Means over seeds. Lines: training loss, a moving mean over a fortieth of the steps, the"
        " raw mean faint. Markers: held-out loss, experts selected as served."
    )


def drop_rate(results: Results) -> Drawing | Skipped:
    """Share of choices that no expert kept, over training."""
    key, title = "drop-rate", "Dropped choices over training"
    variants = gather(results, "step", "drop_rate")
    if not variants:
        return Skipped(key=key, title=title, reason="no run has a drop rate in its metrics")
    figure = new_figure()
    (axes,) = figure.axes
    draw_lines(axes, variants)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value, 0)))
    axes.set_ylabel("dropped choices (%)")
    _label_steps(axes)
    add_legend(figure, [(v.name, v.style) for v in variants], markers=False)
    ends = [(float(smooth(v.line).y[-1]), v.name) for v in variants]
    (least, thrifty), (most, lavish) = min(ends), max(ends)
    if most - least > 0.02:
        title = f"{lavish} ends dropping {percent(most)} of choices, {thrifty} {percent(least)}"
    caption = (
        "Pairs of token and expert that were chosen but not kept, share of all valid pairs; mean"
        " over seeds, a moving mean over a fortieth of the steps, the raw mean faint."
        f"{_absent(results, variants)}"
    )
    return Drawing(key=key, title=title, caption=caption, figure=figure)


def capacity_factor(results: Results) -> Drawing | Skipped:
    """Capacity of an expert in multiples of its even share, over training."""
    key, title = "capacity-factor", "Capacity factor over training"
    variants = gather(results, "step", "capacity_factor")
    if not variants:
        return Skipped(key=key, title=title, reason="no run limits its experts by a capacity")
    figure = new_figure()
    (axes,) = figure.axes
    for variant in variants:
        line = thin(variant.line, MOST_POINTS_IN_ALL // max(len(variants), 15))
        axes.plot(
            line.x,
            line.y,
            color=variant.style.color,
            linestyle=variant.style.linestyle,
            marker=variant.style.marker if line.x.size == 1 else None,
        )
    axes.margins(y=0.08)
    axes.set_ylabel(f"capacity factor ({TIMES} even share)")
    _label_steps(axes)
    add_legend(figure, [(v.name, v.style) for v in variants], markers=False)
    caption = (
        "Tokens that an expert may keep, in multiples of choices / experts; mean over seeds and"
        f" layers.{_absent(results, variants)}"
    )
    return Drawing(key=key, title=title, caption=caption, figure=figure)


def _label_steps(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel("optimizer steps")
