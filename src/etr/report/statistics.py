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
    centre, error = _mean_and_error(values)
    half = t_quantile(len(values) - 1, confidence) * error
    return centre - half, centre + half


def p_value(values: Sequence[float]) -> float | None:
    """Of Student's two-sided test that values have the mean 0; None for fewer than two."""
    if len(values) < 2:
        return None
    from scipy.special import stdtr  # late, as above

    centre, error = _mean_and_error(values)
    if error == 0:
        return 1.0 if centre == 0 else 0.0
    return float(2 * stdtr(len(values) - 1, -abs(centre) / error))


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of at least two values, and its standard error."""
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return centre, math.sqrt(variance / len(values))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several tests survive Holm's correction for how many there are.

    The smallest p-value must not exceed the level over their number, the next one the level over
    one less, and so on until one does.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    survives = [False] * len(p_values)
    for place, number in enumerate(order):
        if p_values[number] > level / (len(p_values) - place):
            break
        survives[number] = True
    return survives
