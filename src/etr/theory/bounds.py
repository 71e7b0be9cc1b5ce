"""Bounds on the success rates: the paper's, with the constants of its proof, and tighter ones.

Outside the range that a theorem states, its side of the interval is the trivial one, 0 or 1, and
``valid`` is False; so every interval here is true everywhere, and says little where not valid.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import rel_entr

from etr.theory._ranges import Array, counts, rates

TOKEN_UPPER = 10.0
"""Upper constant of the paper's Theta(C sum p / s)."""
TOKEN_LOWER = 1 / 5
"""Lower constant; needs `TOKEN_LEAST_CAPACITY` <= C <= 5 s / E."""
TOKEN_LEAST_CAPACITY = 48
"""Tokens."""


class Bounds(NamedTuple):
    """An interval that holds the success rate."""

    lower: Array
    """In [0, 1]."""
    upper: Array
    """In [0, 1]."""
    valid: NDArray[np.bool_]
    """Whether the theorem says what it claims to say."""

    @property
    def vacuous(self) -> NDArray[np.bool_]:
        """Whether it excludes nothing."""
        return (self.lower <= 0.0) & (self.upper >= 1.0)


def token_choice_paper(
    capacity: ArrayLike, num_tokens: ArrayLike, true_positive: ArrayLike
) -> Bounds:
    """The paper's ``Theta(C sum p_i / s)``: between 1/5 and 10 times ``C sum p_i / s``.

    The upper side holds always (1 in place of 10 would do), the lower one, and so `valid`, for
    ``48 <= C <= 5 s/E``. Where C = 5 s/E the lower side is missed by an amount far below float64.

    Args and Raises: as `token_choice_success`.
    """
    c, s = counts("capacity", capacity), counts("num_tokens", num_tokens)
    p = rates("true_positive", true_positive)
    main = c * p.sum(-1) / s
    valid = (c >= TOKEN_LEAST_CAPACITY) & (c <= 5 * s / p.shape[-1])
    valid = np.broadcast_to(np.asarray(valid), main.shape)
    lower = np.where(valid, TOKEN_LOWER * main, 0.0)
    return Bounds(lower, np.minimum(TOKEN_UPPER * main, 1.0), valid)


def token_choice_tight(
    capacity: ArrayLike, num_tokens: ArrayLike, true_positive: ArrayLike
) -> Bounds:
    """``mean(p) min(1, C E / s)``, the useful form, as upper bound; valid everywhere.

    With X ~ Binomial(s, 1/E), mean m and variance v, the success rate is ``mean(p) mean(min(X, C))
    / m``. The minimum is concave, which gives the upper side; and ``|X - C|`` has mean at most
    ``sqrt(v + (m - C)^2)``, which gives the lower: it is never further than ``sqrt(v) / 2m`` of
    mean(p) below the upper.

    Args and Raises: as `token_choice_success`.
    """
    c, s = counts("capacity", capacity), counts("num_tokens", num_tokens)
    p = rates("true_positive", true_positive)
    mean = s / p.shape[-1]
    variance = mean * (1 - 1 / p.shape[-1])
    least = (mean + c - np.hypot(np.sqrt(variance), mean - c)) / 2
    upper = p.mean(-1) * np.minimum(1.0, c / mean)
    lower = p.mean(-1) * np.maximum(least, 0.0) / mean
    return Bounds(lower, upper, np.ones_like(upper, dtype=bool))


def expert_choice_paper(
    capacity: ArrayLike, num_tokens: ArrayLike, false_positive: ArrayLike
) -> Bounds:
    """The paper's two sides, by expert, averaged.

    Expert i contributes ``exp(-(s-1) q_i / 8)`` to the upper side where ``C <= (s-1) q_i / 2``, and
    ``1 - exp(-3C/16)`` to the lower where ``C >= 2 s q_i``. Between the two the theorem is silent;
    `valid` is True where it is silent for no expert.

    Args and Raises: as `expert_choice_success`.
    """
    c, s, q = _by_expert(capacity, num_tokens, false_positive)
    few, many = c <= (s - 1) * q / 2, c >= 2 * s * q
    upper = np.where(few, np.exp(-(s - 1) * q / 8), 1.0)
    lower = np.where(many, -np.expm1(-3 * c / 16), 0.0)
    return Bounds(lower.mean(-1), upper.mean(-1), np.asarray((few | many).all(-1)))


def expert_choice_tight(
    capacity: ArrayLike, num_tokens: ArrayLike, false_positive: ArrayLike
) -> Bounds:
    """Chernoff's bound with the divergence itself, ``exp(-n KL(x / n, q))``; valid everywhere.

    With n = s - 1: the upper side uses x = C - 1 where that is below n q, the lower x = C where
    that is above. It leaves no gap but the width of the transition, about sqrt(s q) around C = s q.

    Args and Raises: as `expert_choice_success`.
    """
    c, s, q = _by_expert(capacity, num_tokens, false_positive)
    n = s - 1
    upper = np.where(c - 1 < n * q, np.exp(-_divergence(c - 1, n, q)), 1.0)
    lower = np.where(c > n * q, -np.expm1(-_divergence(np.minimum(c, n), n, q)), 0.0)
    lower = np.where(c > n, 1.0, lower)  # room for all
    return Bounds(lower.mean(-1), upper.mean(-1), np.ones(lower.shape[:-1], dtype=bool))


def _by_expert(
    capacity: ArrayLike, num_tokens: ArrayLike, false_positive: ArrayLike
) -> tuple[Array, Array, Array]:
    c, s = counts("capacity", capacity)[..., None], counts("num_tokens", num_tokens)[..., None]
    c, s, q = np.broadcast_arrays(c, s, rates("false_positive", false_positive))
    return c, s, q


def _divergence(x: Array, n: Array, q: Array) -> Array:
    """n KL(x/n, q) in nats; infinite where q is 0 or 1 and x/n is not; 0 for n = 0."""
    share = np.clip(x / np.maximum(n, 1.0), 0.0, 1.0)
    with np.errstate(invalid="ignore"):  # 0 inf, for n = 0
        return np.nan_to_num(n * (rel_entr(share, q) + rel_entr(1 - share, 1 - q)), posinf=np.inf)
