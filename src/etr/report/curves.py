"""Curves of runs over training: picked from metrics, averaged over seeds, smoothed, thinned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from etr.report.observations import Array
from etr.report.results import Results, Row

SMOOTHING_SHARE = 40


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line, x ascending."""

    x: Array
    """Steps or FLOP."""
    y: Array
    """Values, all finite."""


CurveOf = Callable[[Row], Curve | None]
"""Picks one run's curve, None where it has none."""


def train_curve(y: str, x: str = "step", scale: float = 1.0) -> CurveOf:
    """A quantity of training steps against steps or another quantity."""

    def pick(row: Row) -> Curve | None:
        if row.metrics is None:
            return None
        steps = row.metrics.step.astype(np.float64)
        return clean(steps if x == "step" else row.metrics.train[x], row.metrics.train[y] * scale)

    return pick


def evaluation_curve(x: str = "step") -> CurveOf:
    """Held-out loss during training, selected as the row says."""

    def pick(row: Row) -> Curve | None:
        if row.metrics is None:
            return None
        found = [e for e in row.metrics.evaluations if e.selection == row.selection]
        xs = [e.step if x == "step" else e.expert_flops for e in found]
        losses = [e.val_loss for e in found]
        return clean(np.array(xs, dtype=np.float64), np.array(losses, dtype=np.float64))

    return pick


def layer_curve(field: str, layer: int | None = None) -> CurveOf:
    """A quantity of one layer against steps; of the mean over layers for None."""

    def pick(row: Row) -> Curve | None:
        if row.metrics is None or field not in row.metrics.layers:
            return None
        values = row.metrics.layers[field]
        if layer is not None:
            chosen = values[:, layer] if layer < values.shape[1] else values[:, 0] * np.nan
        else:
            count = np.isfinite(values).sum(axis=1)
            total = np.where(np.isfinite(values), values, 0.0).sum(axis=1)
            chosen = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
        return clean(row.metrics.step.astype(np.float64), chosen)

    return pick


def clean(x: Array, y: Array) -> Curve | None:
    """The entries where both are finite, x ascending; None if nothing is left."""
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
    line: Curve
    """Mean over seeds, not smoothed."""
    points: Sequence[Curve]
    """Evaluations, one curve per seed."""


def gather(results: Results, pick: CurveOf, points: CurveOf | None = None) -> list[VariantCurves]:
    """The variants that have the curve; `points` are markers beside it."""
    found = []
    for name in results.names:
        rows = results.of(name)
        lines = [curve for row in rows if (curve := pick(row))]
        if lines:
            found.append(
                VariantCurves(
                    name=name,
                    line=mean_curve(lines),
                    points=[curve for row in rows if points and (curve := points(row))],
                )
            )
    return found
