"""Affinity of tokens and experts: grouped average pooling (GrAP), cosine and linear scores.

Router arithmetic is float32, or float64 for float64 inputs; callers convert with `router_dtype`.
Source of GrAP: arXiv 2406.00023, eqs. 2-4. Expert ``e`` of ``E`` owns the block of ``m = H / E``
consecutive dimensions ``[e * m, (e + 1) * m)``; its gate vector is ``E / H`` there and 0 elsewhere,
so the gate vectors are orthogonal without being trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORM_FLOOR = 1e-12
"""Smallest norm divided by, so that a zero token has affinity 0 and never NaN."""

POLAR_ITERATIONS = 25
"""Newton-Schulz steps of `polar_factor`: enough for condition numbers to 1e3 in float32."""


def router_dtype(x: Tensor) -> Tensor:
    """Convert to the router's arithmetic: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def grap_affinity(x: Tensor, num_experts: int) -> Tensor:
    """Cosine of each token and each expert's fixed block vector.

    arXiv 2406.00023, eqs. 2-4: ``sum(x[block e]) / (max(||x||, 1e-12) * sqrt(m))``.

    Args:
        x: tokens, float [T, H].
        num_experts: E; H must be a multiple of it.
    Returns:
        [T, E] in [-1, 1]; the squares of a row sum to at most 1; a zero token gives 0.
    Raises:
        ValueError: H is not divisible by E.
    """
    block = block_width(x.shape[-1], num_experts)
    sums = x.unflatten(-1, (num_experts, block)).sum(-1)
    return sums / (token_norm(x) * block**0.5)


def learned_block_affinity(x: Tensor, weight: Tensor, num_experts: int) -> Tensor:
    """Cosine of each token and a learned vector on each expert's block.

    With one trained number per dimension this is a 1/E-th of a dense router's parameters, the
    ratio that arXiv 2406.00023 states for GrAP.

    Args:
        x: tokens, float [T, H].
        weight: block vectors one after another, float [H].
        num_experts: E.
    Returns:
        [T, E] in [-1, 1].
    Raises:
        ValueError: H is not divisible by E.
    """
    shape = (num_experts, block_width(x.shape[-1], num_experts))
    sums = (x * weight).unflatten(-1, shape).sum(-1)
    norms = weight.unflatten(-1, shape).norm(dim=-1).clamp_min(NORM_FLOOR)
    return sums / (token_norm(x) * norms)


def cosine_affinity(x: Tensor, directions: Tensor, *, unit: bool = False) -> Tensor:
    """Cosine of each token and each row of `directions`.

    Args:
        x: tokens, float [T, H].
        directions: float [E, H].
        unit: the rows already have norm 1.
    Returns:
        [T, E] in [-1, 1] up to rounding.
    """
    products = x @ directions.T / token_norm(x)
    if unit:
        return products
    return products / directions.norm(dim=-1).clamp_min(NORM_FLOOR)


def polar_factor(weight: Tensor) -> Tensor:
    """Nearest matrix with orthonormal rows, by Newton-Schulz iteration.

    ``X <- 1.5 X - 0.5 X X^T X`` from a start whose singular values lie in (0, 1]. The iteration
    is a polynomial, so its gradient exists at an orthonormal start, where those of eigh and svd
    are NaN.

    Args:
        weight: float [E, H], E <= H, of full row rank.
    Returns:
        [E, H] with ``Q Q^T = I`` to about 1e-6 in float32 while the condition number is under
        1e3 (see `condition_number`).
    """
    gram = weight @ weight.T
    bound = gram.abs().sum(-1).amax().clamp_min(NORM_FLOOR**2).sqrt()
    x = weight / bound
    for _ in range(POLAR_ITERATIONS):
        x = 1.5 * x - 0.5 * (x @ x.T) @ x
    return x


@torch.no_grad()
def condition_number(weight: Tensor) -> float:
    """Largest over smallest singular value of `weight` [E, H]. Synchronises the device."""
    singular = torch.linalg.svdvals(router_dtype(weight))
    return float(singular[0] / singular[-1].clamp_min(NORM_FLOOR))


def orthonormal_start(num_experts: int, hidden_size: int) -> Tensor:
    """Random orthonormal rows from torch's global generator, float32 [E, H]."""
    q, _ = torch.linalg.qr(torch.randn(hidden_size, num_experts))
    return q.T.contiguous()


def block_width(hidden_size: int, num_experts: int) -> int:
    """Dimensions per expert block, ``m = H / E``.

    Raises:
        ValueError: H is not divisible by E.
    """
    if hidden_size % num_experts:
        raise ValueError(
            f"hidden_size={hidden_size} is not divisible by num_experts={num_experts}: block "
            "frames give each expert an equal block of dimensions; choose a divisor, or "
            "frame='orthonormal'"
        )
    return hidden_size // num_experts


def token_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each token, at least `NORM_FLOOR`, [T, 1]."""
    return x.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
