"""Lower bound of capacity from the angle between tokens and experts: a diagnostic.

arXiv 2406.00023, Remark 7, and arXiv 2401.13920, Theorem 1. It lies between one token and the mean
load only in a narrow band of affinities (see docs/method.md), so nothing but `LocMoE` and the
option ``floor="erfc"`` acts on it.
"""

from __future__ import annotations

from torch import Tensor


def erfc_bound(hidden_size: int, num_experts: int, affinity: Tensor) -> Tensor:
    """``1 / (E erfc(z))`` with ``z = sqrt(H d^2 / (2 - d^2))``, in tokens.

    Close to the exact form for ``affinity * sqrt(hidden_size) <= 5``; grows without bound after.

    Args:
        hidden_size: H.
        num_experts: E.
        affinity: d >= 0, a cosine, float of any shape.
    Returns:
        Tensor of the same shape; inf where erfc underflows.
    """
    square = affinity.clamp(0.0, 1.0).double().square()
    z = (hidden_size * square / (2.0 - square)).sqrt()
    return 1.0 / (num_experts * z.erfc())
