"""The lower bound of capacity from the angle between tokens and experts.

arXiv 2401.13920, Theorem 1, and arXiv 2406.00023, Remark 7. For a direction that is uniform on the
sphere in H dimensions, ``P[|cosine| >= d] = I_{1-d^2}((H-1)/2, 1/2)``; the bound is one over E
times that.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincc, betaln, erfcx

from etr.theory._ranges import Array, between, counts

Form = Literal["exact", "erfc", "exponential"]
FORMS: tuple[Form, ...] = ("exact", "erfc", "exponential")

# Below this betaincc loses digits or underflows, and the smooth integral takes over.
_SMALL = 1e-280
_NODES, _WEIGHTS = np.polynomial.laguerre.laggauss(40)


def capacity_lower_bound(
    hidden_size: ArrayLike, num_experts: ArrayLike, affinity: ArrayLike, form: Form = "exact"
) -> Array:
    """The bound in tokens.

        exact        1 / (E I_{1-d^2}((H-1)/2, 1/2))
        erfc         1 / (E erfc(z)),  z = sqrt(H d^2 / (2 - d^2))
        exponential  exp(z^2) / E,     never above erfc

    Args:
        hidden_size: H >= 2, any shape.
        num_experts: E >= 1, any shape.
        affinity: d in [0, 1], a cosine, any shape.
        form: which one.
    Returns:
        Tokens, of the broadcast shape; inf over 1.8e308, and for "exact" at d = 1.
    Raises:
        ValueError: an argument is out of range.
    """
    with np.errstate(over="ignore"):
        return np.asarray(
            np.exp(log_capacity_lower_bound(hidden_size, num_experts, affinity, form))
        )


def log_capacity_lower_bound(
    hidden_size: ArrayLike, num_experts: ArrayLike, affinity: ArrayLike, form: Form = "exact"
) -> Array:
    """Natural logarithm of `capacity_lower_bound`, finite where that overflows. Same arguments."""
    h, e = counts("hidden_size", hidden_size, least=2), counts("num_experts", num_experts)
    d = between("affinity", affinity, 0.0, 1.0)
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; choose one of {', '.join(FORMS)}")
    if form == "exact":
        return np.asarray(-np.log(e) - log_cap_probability(h, d))
    z2 = h * d**2 / (2 - d**2)
    if form == "exponential":
        return np.asarray(z2 - np.log(e))
    return np.asarray(z2 - np.log(erfcx(np.sqrt(z2))) - np.log(e))


def log_cap_probability(hidden_size: ArrayLike, affinity: ArrayLike) -> Array:
    """log P[|cosine| >= d] for a uniform direction in H dimensions; -inf at d = 1.

    Args:
        hidden_size: H >= 2, any shape.
        affinity: d in [0, 1], any shape.
    Returns:
        Natural logarithm, of the broadcast shape.
    Raises:
        ValueError: an argument is out of range.
    """
    h, d = np.broadcast_arrays(
        counts("hidden_size", hidden_size, least=2), between("affinity", affinity, 0.0, 1.0)
    )
    a = (h - 1) / 2
    # The complement form: 1 - d^2 would round small affinities away.
    plain = np.asarray(betaincc(0.5, a, d**2))
    small = plain < _SMALL
    with np.errstate(divide="ignore"):
        found = np.asarray(np.log(plain))
        some = np.where(small, d, 0.5)
        log_x = np.log1p(-some) + np.log1p(some)
        # t = x exp(-u/a) turns the integral of t^(a-1) (1-t)^(-1/2) into one of exp(-u) times a
        # function that is nearly flat where x^a is this small.
        inner = -np.expm1(log_x[..., None] - _NODES / a[..., None])
        tail = np.log((_WEIGHTS / np.sqrt(inner)).sum(-1))
        logarithm = a * log_x - np.log(a) - betaln(a, 0.5) + tail
    return np.where(small, logarithm, found)
