"""The geometric model drawn at random: what the exact success rates are checked against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from etr.theory._ranges import Array
from etr.theory.geometric import CHOICES, Choice

Outcome = Choice | Literal["found"]

_CHUNK_NUMBERS = 1 << 21  # normal numbers drawn at once, 16 MiB


@dataclass(frozen=True, kw_only=True)
class GeometricModel:
    """One sample: a class, its telling token at a random place, noise elsewhere."""

    num_tokens: int = 64
    """Tokens per sample, s."""
    num_experts: int = 8
    """Experts, E."""
    hidden_size: int = 16
    """Dimensions, H >= E; the directions of the experts are a random orthonormal set."""
    capacity: int = 6
    """Tokens that an expert keeps, C."""
    signal: float = 1.5
    """Length of the class's direction in its telling token, standard deviations of the noise."""
    sigma: float = 1.0
    """Standard deviation of the noise, per dimension; it scales everything and changes nothing."""
    noisy: bool = False
    """Whether the telling token's score at its own expert has noise."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "num_experts", "capacity"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size < self.num_experts:
            raise ValueError(
                f"hidden_size={self.hidden_size} holds no {self.num_experts} orthonormal "
                "directions; it must be at least num_experts"
            )
        if not self.sigma > 0:
            raise ValueError(f"sigma={self.sigma} must be positive")
        if not 0 <= self.signal < np.inf:
            raise ValueError(f"signal={self.signal} must be finite and not negative")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A share of samples."""

    successes: int
    """Samples that succeeded."""
    samples: int
    """Samples drawn."""

    @property
    def rate(self) -> float:
        """Share that succeeded."""
        return self.successes / self.samples

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval, which stays inside [0, 1] and is not empty at 0 or all successes.

        Raises:
            ValueError: confidence is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence={confidence} must lie between 0 and 1")
        z2 = float(ndtri((1 - confidence) / 2)) ** 2
        n, rate = self.samples, self.rate
        middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
        half = np.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
        low = 0.0 if self.successes == 0 else float(middle - half)
        return low, 1.0 if self.successes == n else float(middle + half)


def simulate(model: GeometricModel, samples: int, seed: int) -> dict[Outcome, Estimate]:
    """Draw samples and route each in the three ways, on the same tokens.

    Args:
        model: what to draw.
        samples: how many, at least 1.
        seed: of numpy's default generator; the same seed gives the same answer.
    Returns:
        Estimate for "token", "expert", "both", and "found": the telling token chose its expert.
    Raises:
        ValueError: samples is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    generator = np.random.default_rng(seed)
    square = generator.standard_normal((model.hidden_size, model.num_experts))
    directions = np.linalg.qr(square)[0]  # [H, E]
    chunk = max(1, _CHUNK_NUMBERS // (model.num_tokens * model.hidden_size))
    totals: dict[Outcome, int] = dict.fromkeys((*CHOICES, "found"), 0)
    for start in range(0, samples, chunk):
        drawn = _route(model, directions, min(chunk, samples - start), generator)
        for name, success in drawn.items():
            totals[name] += int(success.sum())
    return {name: Estimate(successes=n, samples=samples) for name, n in totals.items()}


def _route(
    model: GeometricModel, directions: Array, samples: int, generator: np.random.Generator
) -> dict[Outcome, NDArray[np.bool_]]:
    """Draw [samples, s, H] tokens; whether each way keeps the telling one, bool [samples]."""
    n = np.arange(samples)
    expert = generator.integers(model.num_experts, size=samples)
    place = generator.integers(model.num_tokens, size=samples)
    shape = (samples, model.num_tokens, model.hidden_size)
    tokens = model.sigma * generator.standard_normal(shape)
    own = directions.T[expert]  # [samples, H]
    if not model.noisy:
        telling = tokens[n, place]
        tokens[n, place] -= (telling * own).sum(-1, keepdims=True) * own
    tokens[n, place] += model.signal * model.sigma * own

    scores = tokens @ directions  # [samples, s, E]
    chose = scores.argmax(-1) == expert[:, None]
    at_expert = np.take_along_axis(scores, expert[:, None, None], axis=-1)[..., 0]
    before = np.arange(model.num_tokens) < place[:, None]
    better = at_expert > at_expert[n, place][:, None]
    found = chose[n, place]
    return {
        "found": found,
        "token": found & ((chose & before).sum(-1) < model.capacity),
        "expert": better.sum(-1) < model.capacity,
        "both": found & ((chose & better).sum(-1) < model.capacity),
    }
