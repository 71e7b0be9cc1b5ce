"""The little statistics that a comparison over a few seeds needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


def t_quantile(freedom: float, confidence: float = 0.95) -> float:
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


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, and how far it may be from what it estimates."""

    mean: float
    error: float
    """Standard error."""
    freedom: float
    """Degrees of freedom of the error."""

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's."""
        half = t_quantile(self.freedom, confidence) * self.error
        return self.mean - half, self.mean + half

    def p_value(self) -> float:
        """Of Student's two-sided test that the mean is 0."""
        from scipy.special import stdtr  # late, as above

        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stdtr(self.freedom, -abs(self.mean) / self.error))

    def widened(self, error: float) -> Estimate:
        """The same with a further standard error, known well, that is independent of it."""
        if not error:
            return self
        own, total = self.error**2, self.error**2 + error**2
        freedom = self.freedom * (total / own) ** 2 if own else math.inf
        return replace(self, error=math.sqrt(total), freedom=freedom)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    error = math.sqrt(variance / len(values))
    return Estimate(mean=centre, error=error, freedom=len(values) - 1)


def crossed_estimate(
    values: Sequence[Sequence[float]], weights: Sequence[float], strata: Sequence[int]
) -> Estimate | None:
    """Mean over seeds and documents that are both samples; None for fewer than two seeds.

    The error has the variance between seeds of their weighted means, and that between documents of
    their means over seeds, within each domain, since domains are chosen and not sampled. What seeds
    and documents do together is in both, so that it is rather too large; Satterthwaite's freedom.

    Args:
        values: of each seed, of each document, [N][D].
        weights: of the documents, [D], not all 0.
        strata: the documents' domains, [D].
    """
    import numpy as np

    table, share = np.asarray(values, dtype=float), np.asarray(weights, dtype=float)
    share = share / share.sum()
    found = estimate((table @ share).tolist())
    if found is None:
        return None
    variances, freedoms = [found.error**2], [found.freedom]
    for stratum in set(strata):
        own = np.asarray(strata) == stratum
        count = int(own.sum())
        if count > 1:
            of_document, weight = table[:, own].mean(0), share[own]
            apart = of_document - np.average(of_document, weights=weight)
            variances.append(float((weight**2 * apart**2).sum() * count / (count - 1)))
            freedoms.append(count - 1)
    total = math.fsum(variances)
    if total == 0:
        return found
    spread = math.fsum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
    return Estimate(mean=found.mean, error=math.sqrt(total), freedom=total**2 / spread)


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Interval for the mean of independent values; None for fewer than two."""
    found = estimate(values)
    return None if found is None else found.interval(confidence)


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
