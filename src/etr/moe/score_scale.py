"""Where the bins of the threshold calibration lie: scores mapped to coordinates in [0, 1].

A quantile read off a histogram is as good as its bins are fine where the scores crowd. Cosines
crowd around 0 at first and anywhere later; probabilities crowd at chance, at 0 and at 1.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

NUM_BINS = 256


class ScoreScale:
    """A monotone map of scores to [0, 1], cut into NUM_BINS even bins."""

    def coordinate(self, score: Tensor) -> Tensor:
        """Map scores to [0, 1]."""
        raise NotImplementedError

    def score(self, coordinate: Tensor) -> Tensor:
        """Inverse of `coordinate`, for float64."""
        raise NotImplementedError

    def bin(self, score: Tensor) -> Tensor:
        """Bin of each score, int64 in [0, NUM_BINS)."""
        return (self.coordinate(score) * NUM_BINS).long().clamp(0, NUM_BINS - 1)

    def edges(self) -> Tensor:
        """The NUM_BINS + 1 bin edges as scores, float64."""
        return self.score(torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64))


class CosineScale(ScoreScale):
    """Cosines in [-1, 1]: half of the resolution is spread evenly, half is finest at 0.

    Args:
        hidden_size: H; a random cosine of H dimensions is of size 1 / sqrt(H).
    """

    def __init__(self, hidden_size: int) -> None:
        self.scale = math.sqrt(hidden_size)
        self.span = math.asinh(self.scale)

    def coordinate(self, score: Tensor) -> Tensor:
        return 0.5 + 0.25 * (score + (score * self.scale).asinh() / self.span)

    def score(self, coordinate: Tensor) -> Tensor:
        edges = self._edges.to(coordinate.device)
        place = (coordinate * NUM_BINS).clamp(0, NUM_BINS)
        low = place.long().clamp_max(NUM_BINS - 1)
        return edges[low] + (place - low) * (edges[low + 1] - edges[low])

    @functools.cached_property
    def _edges(self) -> Tensor:
        """Bisect `coordinate`, which has no closed inverse, at the bin edges."""
        goal = torch.linspace(0, 1, NUM_BINS + 1, dtype=torch.float64, device="cpu")
        low, high = torch.full_like(goal, -1.0), torch.full_like(goal, 1.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.coordinate(middle) < goal
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return high


class OddsScale(ScoreScale):
    """Probabilities in (0, 1) by the logarithm of their odds, finest at chance.

    Args:
        chance: probability of no preference, e.g. 1 / E for a softmax over E experts.
    """

    SPAN = math.asinh(24.0)

    def __init__(self, chance: float) -> None:
        self.center = math.log(chance / (1 - chance)) if chance < 1 else 0.0

    def coordinate(self, score: Tensor) -> Tensor:
        # Float32 knows no probability between 1 - 2^-24 and 1.
        odds = score.clamp(1e-12, 1 - 2**-24).logit()
        return 0.5 + (odds - self.center).asinh() / (2 * self.SPAN)

    def score(self, coordinate: Tensor) -> Tensor:
        return (((coordinate - 0.5) * (2 * self.SPAN)).sinh() + self.center).sigmoid()
