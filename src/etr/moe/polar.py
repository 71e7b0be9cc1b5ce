"""Orthonormal directions from a free weight: its polar factor, with a gradient that always exists.

The polar factor U of a weight W = S U (S symmetric positive definite) is the nearest matrix with
orthonormal rows. Differentiating an eigen- or singular value decomposition fails where singular
values are equal, as they are at an orthonormal start; the polar factor's own derivative divides by
sums of singular values alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from etr.moe.kernels.block_affinity import NORM_FLOOR

ITERATIONS = 25
"""Newton-Schulz steps: enough for condition numbers to 1e3 in float32."""


Parts = tuple[Tensor, ...]
"""The factor U [E, H] of a weight S U; in float64 the eigenvalues [E] and eigenvectors [E, E] of S,
and its inverse [E, E]."""


def polar_factor(weight: Tensor, parts: Parts | None = None) -> Tensor:
    """Nearest matrix with orthonormal rows.

    On the CPU by an eigendecomposition of the small Gram matrix in float64 and a closed-form
    gradient; elsewhere, and while compiling, by Newton-Schulz iteration, which waits for nothing.

    Args:
        weight: float [E, H], E <= H, of full row rank.
        parts: what `polar_parts` found for these values, to spare finding it again.
    Returns:
        [E, H] with ``Q Q^T = I`` to about 1e-6 in float32 while the condition number is under
        1e3 (see `condition_number`).
    """
    if parts is None:
        if weight.device.type != "cpu" or torch.compiler.is_compiling():
            return newton_schulz(weight)
        parts = polar_parts(weight)
    factor: Tensor = _PolarFactor.apply(weight, *parts)
    return factor


@torch.no_grad()
def polar_parts(weight: Tensor) -> Parts:
    """The factor of a weight [E, H], and what its gradient is computed from."""
    w = weight.double()
    gram = w @ w.mT
    # Weights that diverged give NaN, as Newton-Schulz does: LAPACK would raise an error of its own
    # before anything could say that the loss is NaN.
    nan_or_zero = gram.sum((-2, -1)) * 0
    values, basis = torch.linalg.eigh(gram.nan_to_num(0.0, 0.0, 0.0))
    singular = values.clamp_min(NORM_FLOOR**2).sqrt() + nan_or_zero.unsqueeze(-1)
    inverse = (basis / singular.unsqueeze(-2)) @ basis.mT
    return (inverse @ w).to(weight.dtype), singular, basis, inverse


_KNOWN: dict[tuple[StorageWeakRef, int], tuple[Tensor, Parts]] = {}
"""By place in memory: a copy of the weight that last stood there, and its parts."""


def known_parts(weight: Tensor, dtype: torch.dtype) -> Parts:
    """`polar_parts` of a weight in a dtype, found once while its values stay; shared, so read only.

    Elsewhere than on the CPU the factor alone. Whether values do stay is seen by comparing them
    with a copy, since writes through ``.data`` leave no other trace: a tenth or less of finding the
    parts on a CPU. On a GPU the host waits for that.
    """
    place = StorageWeakRef(weight.untyped_storage()), int(weight.storage_offset())
    known = _KNOWN.get(place)
    if known is None or known[1][0].dtype != dtype or not _same(known[0], weight):
        for old in list(_KNOWN):
            if old[0].expired():
                _KNOWN.pop(old, None)
        with torch.inference_mode(False), torch.no_grad():
            copy = weight.detach().clone()
            now = copy.to(dtype)
            found = polar_parts(now) if now.device.type == "cpu" else (newton_schulz(now),)
            known = _KNOWN[place] = copy, found
    return known[1]


def _same(known: Tensor, weight: Tensor) -> bool:
    alike = known.dtype == weight.dtype and known.device == weight.device
    return alike and torch.equal(known, weight)


@torch.library.custom_op("etr::known_factor", mutates_args=())
def known_factor(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor of `known_parts` without gradient, for a graph: compilers see one operator."""
    return known_parts(weight, dtype)[0].clone()  # compilers may write into what they get


@known_factor.register_fake
def _(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)


def newton_schulz(weight: Tensor) -> Tensor:
    """`polar_factor` by ``X <- 1.5 X - 0.5 X X^T X`` from singular values in (0, 1].

    Args:
        weight: float [E, H], E <= H, of full row rank.
    """
    gram = weight @ weight.T
    bound = gram.abs().sum(-1).amax().clamp_min(NORM_FLOOR**2).sqrt()
    x = weight / bound
    for _ in range(ITERATIONS):
        x = 1.5 * x - 0.5 * (x @ x.T) @ x
    return x


@torch.no_grad()
def condition_number(weight: Tensor) -> float:
    """Largest over smallest singular value of `weight` [E, H]. Synchronises the device.

    Infinite where a value is NaN or infinite, as after a step that diverged.
    """
    if not bool(torch.isfinite(weight).all()):
        return math.inf
    singular = torch.linalg.svdvals(weight if weight.dtype == torch.float64 else weight.float())
    return float(singular[0] / singular[-1].clamp_min(NORM_FLOOR))


def orthonormal_start(
    num_experts: int, hidden_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Random orthonormal rows from torch's global generator, [E, H].

    Args:
        dtype: float32 or float64; there is no decomposition in half precision.
    """
    q, _ = torch.linalg.qr(torch.randn(hidden_size, num_experts, dtype=dtype))
    return q.T.contiguous()


class _PolarFactor(torch.autograd.Function):
    """U = (W W^T)^(-1/2) W.

    With dW = dS U + S dU and A = dU U^T, which is antisymmetric, S A + A S = dW U^T - U dW^T; in
    the eigenbasis of S that is a division by s_i + s_j. What dU has outside the rows of U is
    S^-1 dW (I - U^T U).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, *parts: Tensor) -> Tensor:
        return parts[0].view_as(parts[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor, singular, basis, inverse = ctx.saved_tensors
        u, g = factor.double(), grad.double()
        inside = g @ u.mT
        turn = basis.mT @ (inside - inside.mT) @ basis
        turn = basis @ (turn / (singular.unsqueeze(-1) + singular.unsqueeze(-2))) @ basis.mT
        outside = inverse @ (g - inside @ u)
        return (turn @ u + outside).to(grad.dtype), None, None, None, None
