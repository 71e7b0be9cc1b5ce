"""Statistics of rounds: medians with quartiles, and slopes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return Spread(median=median, low=low, high=high, count=len(values))


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
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
