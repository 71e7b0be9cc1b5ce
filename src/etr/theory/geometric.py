"""Success rates in the geometric model, and where expert choice overtakes token choice.

Experts have orthonormal directions v_i. The class's token is ``signal v_i`` plus noise, the others
are noise; a score is a component along a direction, in standard deviations of the noise. So scores
of other tokens are independent standard normal, and the telling token's score at its expert is the
signal ("fixed": its noise along v_i is removed) or normal around it ("noisy").

Given that score x, another token chooses the expert with probability 1/E, outscores x with
``1 - Phi(x)``, and does both with ``(1 - Phi(x)^E) / E``. The noisy rates are means over x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_ndtr, ndtr
from scipy.stats import binom

from etr.theory._ranges import Array, between, counts
from etr.theory.success import expected_kept

Choice = Literal["token", "expert", "both"]
CHOICES: tuple[Choice, ...] = ("token", "expert", "both")
MAX_SIGNAL = 30.0

# The trapezoid rule on a smooth function under a Gaussian: error far below float64 rounding.
_STEP = 1 / 32
_OFFSETS = np.arange(-9.0, 9.0 + _STEP / 2, _STEP)
_WEIGHTS = np.exp(-(_OFFSETS**2) / 2) / np.exp(-(_OFFSETS**2) / 2).sum()
_SCAN = np.linspace(0.0, 8.0, 257)


def true_positive(signal: ArrayLike, num_experts: ArrayLike, noisy: bool = False) -> Array:
    """p: probability that the telling token chooses its expert, ``Phi(x)^(E-1)``.

    Args:
        signal: standard deviations of the noise, in [0, 30], any shape.
        num_experts: E >= 1, any shape.
        noisy: whether its score at its expert has noise.
    Returns:
        Probability, of the broadcast shape.
    Raises:
        ValueError: an argument is out of range.
    """
    a, e = between("signal", signal, 0.0, MAX_SIGNAL), counts("num_experts", num_experts)
    a, e = np.broadcast_arrays(a, e)
    return _over_score(a, noisy, lambda x: np.exp((e[..., None] - 1) * log_ndtr(x)))


def false_positive(signal: ArrayLike, noisy: bool = False) -> Array:
    """q: probability that another token outscores the telling one; marginal if noisy.

    Args and Raises: as `true_positive`.
    """
    a = between("signal", signal, 0.0, MAX_SIGNAL)
    return np.asarray(ndtr(-a / np.sqrt(2)) if noisy else ndtr(-a))


def geometric_success(
    choice: Choice,
    capacity: ArrayLike,
    num_tokens: ArrayLike,
    num_experts: ArrayLike,
    signal: ArrayLike,
    noisy: bool = False,
) -> Array:
    """Exact success rate of a choice ("noisy": by quadrature, to about 1e-13).

    Args:
        choice: "token" (first come), "expert" (C best of all), "both" (C best of its choosers).
        capacity: C >= 1, tokens, any shape.
        num_tokens: s >= 1, any shape.
        num_experts: E >= 1, any shape.
        signal: standard deviations of the noise, in [0, 30], any shape.
        noisy: whether the telling token's score at its expert has noise.
    Returns:
        Success rate, of the broadcast shape.
    Raises:
        ValueError: an argument is out of range.
    """
    if choice not in CHOICES:
        raise ValueError(f"choice={choice!r} is unknown; choose one of {', '.join(CHOICES)}")
    c, s, e, a = np.broadcast_arrays(
        counts("capacity", capacity),
        counts("num_tokens", num_tokens),
        counts("num_experts", num_experts),
        between("signal", signal, 0.0, MAX_SIGNAL),
    )
    if choice == "token":
        share = np.minimum(expected_kept(c, s, e) * e / s, 1.0)
        return np.asarray(true_positive(a, e, noisy) * share)
    c, s, e = c[..., None], s[..., None], e[..., None]
    if choice == "expert":
        return _over_score(a, noisy, lambda x: binom.cdf(c - 1, s - 1, ndtr(-x)))

    def both(x: Array) -> Array:
        rivals = -np.expm1(e * log_ndtr(x)) / e
        return np.asarray(np.exp((e - 1) * log_ndtr(x)) * binom.cdf(c - 1, s - 1, rivals))

    return _over_score(a, noisy, both)


def crossover(
    capacity: ArrayLike, num_tokens: ArrayLike, num_experts: ArrayLike, noisy: bool = False
) -> Array:
    """The least signal from which expert choice succeeds at least as often as token choice.

    With noise it is 0 for every size: a token's odds of being the telling one grow with its score,
    so no way of keeping C tokens succeeds more often than keeping the C best.

    Args:
        capacity: C >= 1, tokens, any shape.
        num_tokens: s >= 1, any shape.
        num_experts: E >= 1, any shape.
        noisy: whether the telling token's score at its expert has noise.
    Returns:
        Signal in standard deviations of the noise, of the broadcast shape, to 1e-9; NaN if there is
        none up to 8.
    Raises:
        ValueError: an argument is out of range.
    """
    c, s, e = np.broadcast_arrays(
        counts("capacity", capacity),
        counts("num_tokens", num_tokens),
        counts("num_experts", num_experts),
    )
    c, s, e = c[..., None], s[..., None], e[..., None]

    def ahead(signal: Array) -> Array:
        expert = geometric_success("expert", c, s, e, signal, noisy)
        return np.asarray(expert - geometric_success("token", c, s, e, signal, noisy) >= -1e-12)

    behind = ~ahead(_SCAN).astype(bool)
    last = np.where(behind.any(-1), _SCAN.size - 1 - behind[..., ::-1].argmax(-1), -1)[..., None]
    low = _SCAN[np.maximum(last, 0)]
    high = _SCAN[np.clip(last + 1, 0, _SCAN.size - 1)]
    for _ in range(26):  # (1/32) 2^-26 < 1e-9
        middle = (low + high) / 2
        over = ahead(middle).astype(bool)
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    found = np.where(last < 0, 0.0, high)
    return np.asarray(np.where(last == _SCAN.size - 1, np.nan, found)[..., 0])


def _over_score(signal: Array, noisy: bool, rate: Callable[[Array], Array]) -> Array:
    """The rate at the score, or its mean over scores; the last dimension of x runs over scores."""
    x = signal[..., None]
    if not noisy:
        return np.asarray(rate(x)[..., 0])
    return np.asarray(rate(x + _OFFSETS) @ _WEIGHTS)
