"""The little statistics that a comparison over a few seeds needs."""

import math
from collections.abc import Sequence


def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """The t for which a Student variable lies in [-t, t] with probability `confidence`.

    Exact for a whole number of degrees of freedom: the distribution is then a finite sum in
    cos(theta), theta = atan(t / sqrt(freedom)) (Abramowitz & Stegun 26.7.3-4); theta is bisected.

    Raises:
        ValueError: freedom < 1, or confidence outside (0, 1).
    """
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1 (two values), got {freedom}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if _central_probability(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _central_probability(theta: float, freedom: int) -> float:
    odd = freedom % 2
    term = total = math.cos(theta) if odd else 1.0
    for index in range(2 + odd, freedom - 1, 2):
        term *= math.cos(theta) ** 2 * (index - 1) / index
        total += term
    if not odd:
        return math.sin(theta) * total
    return 2 / math.pi * (theta + (math.sin(theta) * total if freedom > 1 else 0.0))


def mean(values: Sequence[float]) -> float:
    """Mean of at least one value, without rounding error in the sum."""
    return math.fsum(values) / len(values)


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Interval for the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    half = t_quantile(len(values) - 1, confidence) * math.sqrt(variance / len(values))
    return centre - half, centre + half
