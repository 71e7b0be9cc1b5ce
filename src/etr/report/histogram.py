"""Densities of a router's scores: of the experts that tokens chose, and of all the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etr.report.wording import significant


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Densities of the router's scores: of chosen experts (`own`) and of all the others."""

    edges: NDArray[np.float64]
    """Bin edges, ascending, [n + 1]."""
    own: NDArray[np.float64]
    """Density of the chosen experts' scores, [n]."""
    others: NDArray[np.float64]
    """Density of the scores of the experts not chosen, [n]."""

    @property
    def apart(self) -> str:
        """Distance of the two means in the router's unit, in words; `not` where one is empty."""
        widths = np.diff(self.edges)
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        means = []
        for density in (self.own, self.others):
            mass = float((density * widths).sum())
            means.append(float((density * widths * centres).sum()) / mass if mass > 0 else np.nan)
        gap = means[0] - means[1]
        return significant(gap, 2) if np.isfinite(gap) else "not"


def parse_histogram(raw: Mapping[str, Any], where: str, prefix: str = "") -> Histogram:
    """A histogram from lists of numbers.

    Args:
        raw: holds `edges`, `own` and `others`, each name after `prefix`.
        where: names the histogram in errors.
        prefix: what the three names start with.
    Raises:
        ValueError: a list lacks, lengths do not fit, or edges do not ascend.
    """
    try:
        edges, own, others = (
            np.asarray(raw[prefix + key], dtype=np.float64) for key in ("edges", "own", "others")
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where} needs lists of numbers `edges`, `own` and `others`") from error
    bins = (edges.size - 1,)
    if edges.ndim != 1 or bins[0] < 1 or own.shape != bins or others.shape != bins:
        raise ValueError(
            f"{where} needs n + 1 edges for n values, got"
            f" {edges.size} edges, {own.size} own, {others.size} others"
        )
    if not (np.isfinite(edges).all() and (np.diff(edges) > 0).all()):
        raise ValueError(f"{where} edges must be finite and ascending")
    return Histogram(edges=edges, own=np.nan_to_num(own), others=np.nan_to_num(others))


def mean_histogram(histograms: Sequence[Histogram | None]) -> Histogram | None:
    """Mean over the seeds that share the first one's bins."""
    present = [histogram for histogram in histograms if histogram is not None]
    if not present:
        return None
    same = [h for h in present if np.array_equal(h.edges, present[0].edges)]
    return Histogram(
        edges=present[0].edges,
        own=np.mean([h.own for h in same], axis=0),
        others=np.mean([h.others for h in same], axis=0),
    )
