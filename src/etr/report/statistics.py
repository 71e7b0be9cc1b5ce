"""The little statistics that a comparison over a few seeds needs."""

import math
from collections.abc import Sequence


def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """The t for which a Student variable lies in [-t, t] with probability `confidence`.

    Raises:
        ValueError: freedom < 1, or confidence outside (0, 1).
    """
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1 (two values), got {freedom}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    from scipy.special import stdtrit  # late: commands without intervals start faster

    return float(stdtrit(freedom, (1 + confidence) / 2))


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
