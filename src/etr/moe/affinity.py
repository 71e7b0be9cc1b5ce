"""Affinity of tokens and experts: grouped average pooling (GrAP), cosine and linear scores.

Router arithmetic is float32, or float64 for float64 inputs. The block frames convert tokens
themselves, a few at a time; for the other scores callers convert with `router_dtype`.
Source of GrAP: arXiv 2406.00023, eqs. 2-4. Expert ``e`` of ``E`` owns the block of ``m = H / E``
consecutive dimensions ``[e * m, (e + 1) * m)``; its gate vector is ``E / H`` there and 0 elsewhere,
so the gate vectors are orthogonal without being trained.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from etr.moe.kernels.block_affinity import NORM_FLOOR, block_affinity


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Where operations run in the dtype of their inputs, on the device of `x`.

    Where nothing casts there is nothing to turn off: the context of torch costs as much as a small
    operation, in Python.
    """
    device = x.device.type
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device_type=device, enabled=False) if on else nullcontext()


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The router's arithmetic for tokens of a dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def router_dtype(x: Tensor) -> Tensor:
    """Convert to the router's arithmetic."""
    return x.to(arithmetic(x.dtype))


def grap_affinity(x: Tensor, num_experts: int) -> Tensor:
    """Cosine of each token and each expert's fixed block vector.

    arXiv 2406.00023, eqs. 2-4: ``sum(x[block e]) / (max(||x||, 1e-12) * sqrt(m))``.

    Args:
        x: tokens, float [T, H] of any precision.
        num_experts: E; H must be a multiple of it.
    Returns:
        [T, E] in [-1, 1], float32 (float64 for float64 tokens); the squares of a row sum to at
        most 1; a zero token gives 0.
    Raises:
        ValueError: H is not divisible by E.
    """
    block_width(x.shape[-1], num_experts)
    return block_affinity(x, None, num_experts)


def learned_block_affinity(x: Tensor, weight: Tensor, num_experts: int) -> Tensor:
    """Cosine of each token and a learned vector on each expert's block.

    With one trained number per dimension this is a 1/E-th of a dense router's parameters, the
    ratio that arXiv 2406.00023 states for GrAP.

    Args:
        x: tokens, float [T, H] of any precision.
        weight: block vectors one after another, float [H].
        num_experts: E.
    Returns:
        [T, E] in [-1, 1], float32 (float64 for float64 tokens).
    Raises:
        ValueError: H is not divisible by E.
    """
    block_width(x.shape[-1], num_experts)
    return block_affinity(x, weight, num_experts)


def block_directions(
    hidden_size: int, num_experts: int, dtype: torch.dtype, weight: Tensor | None = None
) -> Tensor:
    """Block vectors as a table [E, H]: of GrAP, or with the `weight` [H] of a learned frame."""
    block = block_width(hidden_size, num_experts)
    if weight is None:
        weight = torch.full((hidden_size,), num_experts / hidden_size, dtype=dtype)
    own = torch.eye(num_experts, dtype=dtype, device=weight.device)
    return own.repeat_interleave(block, dim=1) * weight.to(dtype)


def cosine_affinity(
    x: Tensor, directions: Tensor, *, unit: bool = False, scale: Tensor | float | None = None
) -> Tensor:
    """Cosine of each token and each row of `directions`, times a scale if there is one.

    Args:
        x: tokens, float [T, H] of any precision.
        directions: [E, H], float32 (float64 for float64 tokens).
        unit: the rows already have norm 1.
        scale: one number, or one per token [T, 1]; applied together with the tokens' norms, in
            one pass over the products.
    Returns:
        [T, E] in [-1, 1] up to rounding, or in [-scale, scale].
    """
    if torch.compiler.is_compiling() or (x.dtype == directions.dtype and not _learns(x)):
        products, norms = product(x, directions), token_norm(x.to(directions.dtype))
    else:
        products, norms = _Products.apply(x, directions, True)
        norms = norms.clamp_min(NORM_FLOOR)
    found: Tensor = products / norms if scale is None else products * (scale / norms)
    if unit:
        return found
    return found / directions.norm(dim=-1).clamp_min(NORM_FLOOR)


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


def _learns(x: Tensor) -> bool:
    """Whether a gradient of tokens is wanted, or may be."""
    return x.requires_grad and torch.is_grad_enabled()


def token_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each token, at least `NORM_FLOOR`, [T, 1]."""
    return x.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` in the router's arithmetic.

    Args:
        x: tokens, float [T, H] of any precision.
        weight: [E, H], float32 (float64 for float64 tokens).
    Returns:
        [T, E].
    """
    if x.dtype == weight.dtype or torch.compiler.is_compiling():
        return x.to(weight.dtype) @ weight.T
    found: Tensor = _Products.apply(x, weight, False)[0]
    return found


class _Products(torch.autograd.Function):
    """Products of tokens and weights, and the tokens' norms if asked for.

    The backward pass keeps the tokens as they are, as that of the experts does: no float32 copy of
    those in half precision, and nothing as large as them for their norms, whose gradient is added
    to that of the products in place. Compilers see to that themselves.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, norms: bool) -> tuple[Tensor, Tensor]:
        copy = x.to(weight.dtype)
        return copy @ weight.T, copy.norm(dim=-1, keepdim=True) if norms else weight.new_zeros(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, ctx.norms = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.save_for_forward(x, weight, output[1])

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, grad_norm: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, norm = ctx.saved_tensors
        of_x, of_weight, _ = ctx.needs_input_grad
        copy, grad_x = x.to(weight.dtype), None
        if of_x:
            grad_x = grad @ weight
            if ctx.norms:
                add = grad_x.addcmul if torch.is_grad_enabled() else grad_x.addcmul_
                grad_x = add(copy, (grad_norm / norm).masked_fill(norm == 0, 0.0))
            grad_x = grad_x.to(x.dtype)
        return grad_x, grad.mT @ copy if of_weight else None, None

    @staticmethod
    def jvp(
        ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, _: None
    ) -> tuple[Tensor, Tensor]:
        x, weight, norm = ctx.saved_tensors
        copy = x.to(weight.dtype)
        moves = torch.zeros_like(copy) if x_t is None else x_t.to(weight.dtype)
        found = moves @ weight.T
        if weight_t is not None:
            found = found + copy @ weight_t.T
        if not ctx.norms:
            return found, torch.zeros_like(norm)
        along = (copy * moves).sum(-1, keepdim=True) / norm
        return found, along.masked_fill(norm == 0, 0.0)
