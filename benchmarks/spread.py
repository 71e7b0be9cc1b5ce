"""Statistics of rounds: medians with quartiles, and slopes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles of a few values.

    Args:
        median, low, high: the 50th, 25th and 75th percentiles, interpolated.
        count: how many values there were.
    """

    median: float
    low: float
    high: float
    count: int

    def inverse(self) -> Spread:
        """The spread of the reciprocals (exact for quartiles, up to interpolation)."""
        return Spread(
            median=1 / self.median, low=1 / self.high, high=1 / self.low, count=self.count
        )


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("values is empty; a spread needs at least one")
    ordered = sorted(values)
    return Spread(
        median=quantile(ordered, 0.5),
        low=quantile(ordered, 0.25),
        high=quantile(ordered, 0.75),
        count=len(ordered),
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the neighbours of position ``share * (n - 1)``."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def paired_ratio(
    above: Sequence[float | None], below: Sequence[float | None], scale: float = 1.0
) -> Spread | None:
    """Spread of the ratios within rounds; None if no round timed both.

    Args:
        above, below: seconds by round, None where a round left the system out.
        scale: multiplies every ratio.
    """
    ratios = [
        scale * a / b for a, b in zip(above, below, strict=False) if a is not None and b is not None
    ]
    return spread(ratios) if ratios else None


def log_slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent p of the least-squares fit ``value ~ size ** p``.

    Raises:
        ValueError: fewer than two different sizes.
    """
    if len(set(sizes)) < 2:
        raise ValueError(f"sizes={list(sizes)} must hold at least two different values")
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / sum((a - mean_x) ** 2 for a in x)
