"""Exact success rates of token choice and expert choice.

The model of arXiv 2406.00023: a sample has s tokens. One tells the class i, uniform over the E
experts, from a uniform position; the others are spread evenly over the experts. Routing succeeds
if expert i keeps that token. Expert i has room for C tokens.

Everything broadcasts: capacities and token counts of any shape against the leading dimensions of
the rates, whose last dimension counts experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from etr.theory._ranges import Array, between, counts, rates


def token_choice_success(
    capacity: ArrayLike, num_tokens: ArrayLike, true_positive: ArrayLike
) -> Array:
    """Tokens choose, experts keep the first C that come.

    ``(1/E) sum_i p_i (1/s) sum_{j=1..s} P[Binomial(j-1, 1/E) <= C-1]``. The inner mean is computed
    as ``expected_kept / (s/E)``: if N is the place of the C-th token of an expert, the sum is
    ``mean min(N, s)``, and by Wald's identity E times the mean of ``min(Binomial(s, 1/E), C)``.

    Args:
        capacity: C >= 1, tokens, any shape.
        num_tokens: s >= 1, any shape.
        true_positive: p_i, probability that class i's token chooses expert i, [..., E].
    Returns:
        Success rate, of the broadcast shape.
    Raises:
        ValueError: an argument is out of range.
    """
    p = rates("true_positive", true_positive)
    share = expected_kept(capacity, num_tokens, p.shape[-1])
    share = share * p.shape[-1] / counts("num_tokens", num_tokens)
    return np.asarray(p.mean(-1) * np.minimum(share, 1.0))


def expected_kept(capacity: ArrayLike, num_tokens: ArrayLike, num_experts: ArrayLike) -> Array:
    """Mean of ``min(Binomial(s, 1/E), C)``: tokens an expert keeps when choices are even.

    Args:
        capacity: C >= 1, tokens, any shape.
        num_tokens: s >= 1, any shape.
        num_experts: E >= 1, any shape.
    Returns:
        Tokens, of the broadcast shape.
    Raises:
        ValueError: an argument is out of range.
    """
    c, s = counts("capacity", capacity), counts("num_tokens", num_tokens)
    share = 1.0 / counts("num_experts", num_experts)
    full = c * binom.sf(c - 1, s, share)
    # sum_{x < C} x P[Binomial(s, r) = x] = s r P[Binomial(s-1, r) <= C-2]
    return np.asarray(full + s * share * binom.cdf(c - 2, s - 1, share))


def expert_choice_success(
    capacity: ArrayLike, num_tokens: ArrayLike, false_positive: ArrayLike
) -> Array:
    """Each expert keeps the C best of all tokens: ``mean_i P[Binomial(s-1, q_i) <= C-1]``.

    Exact where the telling token's score is a fixed number. Where it is random, this holds given
    the score, and putting the mean of q here is far off: see `geometric_success`.

    Args:
        capacity: C >= 1, tokens, any shape.
        num_tokens: s >= 1, any shape.
        false_positive: q_i, probability that another token outscores class i's at expert i,
            [..., E].
    Returns:
        Success rate, of the broadcast shape.
    Raises:
        ValueError: an argument is out of range.
    """
    c, s = counts("capacity", capacity), counts("num_tokens", num_tokens)
    q = rates("false_positive", false_positive)
    return np.asarray(binom.cdf(c[..., None] - 1, s[..., None] - 1, q).mean(-1))


def required_capacity(
    wanted: ArrayLike, num_tokens: ArrayLike, success: Callable[[Array], Array]
) -> NDArray[np.int64]:
    """The smallest capacity whose success rate is at least `wanted`, by bisection.

    Args:
        wanted: success rate in [0, 1], any shape.
        num_tokens: s >= 1, the largest capacity tried, any shape.
        success: capacity (float64, whole, of the broadcast shape) -> rate, not falling; for example
            ``lambda c: expert_choice_success(c, 128, q)``.
    Returns:
        Capacity in tokens, of the broadcast shape.
    Raises:
        ValueError: an argument is out of range, or no capacity reaches `wanted`.
    """
    target, high = np.broadcast_arrays(
        between("wanted", wanted, 0.0, 1.0), counts("num_tokens", num_tokens)
    )
    reached = success(high)
    if (reached < target).any():
        worst = np.argmax(target - reached)
        raise ValueError(
            f"wanted={target.flat[worst]:g} is out of reach; with room for every token the success "
            f"rate is {np.broadcast_to(reached, target.shape).flat[worst]:.6g}"
        )
    low, high = np.zeros_like(high), high.copy()
    while (high - low > 1).any():
        middle = np.maximum(np.floor((low + high) / 2), 1.0)
        enough = success(middle) >= target
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return high.astype(np.int64)
