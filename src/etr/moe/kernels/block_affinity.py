"""Affinity of tokens to block vectors: one pass forward, a closed form backward.

With ``s[t, e] = sum over block e of x * w``, ``n[t] = ||x_t||`` and ``u[e] = ||w_e||`` the affinity
is ``a = s / (n u)``, and for an incoming gradient ``g``

    dx = c[t, e] * w - r[t] * x         c = g / (n u),   r = sum_e(g a) / n^2
    dw = sum_t(c[t, e] * x) - q[e] * w                   q = sum_t(g a) / u^2

so backward is one pass too, and nothing of the size of x is kept but x itself. Half-precision
tokens are converted a block of rows at a time: no float32 copy of x ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NORM_FLOOR = 1e-12
"""Smallest norm divided by, so that a zero token has affinity 0 and never NaN."""

BLOCK_ELEMENTS = 1 << 20
"""Elements of x that are worked on at a time on a CPU: 4 MiB in float32, well within its cache."""


def block_affinity(x: Tensor, weight: Tensor | None, num_experts: int) -> Tensor:
    """Cosine of each token and each expert's block vector.

    Equal to `block_affinity_plain` and differentiable as often, but faster.

    Args:
        x: tokens, float [T, H] of any precision.
        weight: block vectors one after another, float [H], or None for all ones.
        num_experts: E, a divisor of H.
    Returns:
        [T, E] in [-1, 1], float32, or float64 for float64 tokens.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = None if weight is None else weight.to(dtype)
    if torch.compiler.is_compiling():
        return _Compiled.apply(x, weight, num_experts)
    return _BlockAffinity.apply(x, weight, num_experts)[0]


def block_affinity_plain(x: Tensor, weight: Tensor | None, num_experts: int) -> Tensor:
    """The same by its definition, in operations that autograd knows."""
    x = x if x.dtype == torch.float64 else x.float()
    shape = (num_experts, x.shape[-1] // num_experts)
    sums = (x if weight is None else x * weight).unflatten(-1, shape).sum(-1)
    norm = x.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    return sums / (norm * _block_norm(weight, shape))


def _block_norm(weight: Tensor | None, shape: tuple[int, int]) -> Tensor | float:
    if weight is None:
        return float(shape[1] ** 0.5)
    return weight.unflatten(-1, shape).norm(dim=-1).clamp_min(NORM_FLOOR)


def _blocks(*tensors: Tensor) -> Any:
    """The tensors in blocks of rows, together; on a device other than the CPU all rows at once."""
    rows = max(1, BLOCK_ELEMENTS // max(tensors[0].shape[-1], 1))
    if tensors[0].device.type != "cpu":
        rows = max(1, tensors[0].shape[0])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _sums_and_norm(x: Tensor, weight: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
    """Block sums of x * weight [T, E], and the norm of each token [T, 1]."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (num_experts, x.shape[1] // num_experts)
    found = []
    for (rows,) in _blocks(x):
        if x.device.type == "cpu":  # where a half-precision sum along rows is very slow
            rows = rows.to(dtype)
        weighted = rows if weight is None else rows * weight
        sums = weighted.unflatten(-1, shape).sum(-1, dtype=dtype)
        found.append((sums, torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=dtype)))
    if len(found) == 1:
        return found[0]
    sums, norms = zip(*found, strict=True)
    return torch.cat(sums), torch.cat(norms)


class _BlockAffinity(torch.autograd.Function):
    """(x, weight, num_experts) -> affinity [T, E], norm of each token [T, 1] (no gradient)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor]:
        sums, norm = _sums_and_norm(x, weight, num_experts)
        norm.clamp_min_(NORM_FLOOR)
        shape = (num_experts, x.shape[1] // num_experts)
        return sums.div_(norm * _block_norm(weight, shape)), norm

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, ctx.num_experts = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, *output)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, affinity, norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted
            return *_differentiable_backward(x, weight, ctx.num_experts, grad), None
        shape = (ctx.num_experts, x.shape[1] // ctx.num_experts)
        unit = _block_norm(weight, shape)
        share = grad * affinity
        # Where the floor stands in for the norm, the norm has no gradient.
        pull = torch.where(norm > NORM_FLOOR, share.sum(-1, keepdim=True) / norm / norm, 0.0)
        scaled = grad / (norm * unit)
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = _token_grad(x, weight, scaled, pull) if need_x else None
        if weight is None or not need_weight:
            return grad_x, None, None
        grad_weight = torch.zeros(shape, dtype=scaled.dtype, device=x.device)
        for rows, scaled_rows in _blocks(x, scaled):
            grad_weight += (rows.unflatten(-1, shape) * scaled_rows[:, :, None]).sum(0)
        assert isinstance(unit, Tensor)
        back = torch.where(unit > NORM_FLOOR, share.sum(0) / unit / unit, 0.0)
        return grad_x, (grad_weight - back[:, None] * weight.view(shape)).flatten(), None

    @staticmethod
    def jvp(ctx: Any, x_t: Tensor | None, weight_t: Tensor | None, _: None) -> tuple[Tensor, None]:
        x, weight = ctx.saved_tensors
        x, shape, norm, unit = _parts(x, weight, ctx.num_experts)
        affinity = block_affinity_plain(x, weight, ctx.num_experts)
        moved = torch.zeros_like(affinity)
        if x_t is not None:
            x_t = x_t.to(x.dtype)
            sums = (x_t if weight is None else x_t * weight).unflatten(-1, shape).sum(-1)
            pull = (x * x_t).sum(-1, keepdim=True) / norm / norm
            moved = sums / (norm * unit) - affinity * torch.where(norm > NORM_FLOOR, pull, 0.0)
        if weight_t is not None and weight is not None:
            sums = (x * weight_t).unflatten(-1, shape).sum(-1)
            pull = (weight * weight_t).unflatten(-1, shape).sum(-1) / unit / unit
            moved = moved + sums / (norm * unit)
            moved = moved - affinity * torch.where(unit > NORM_FLOOR, pull, 0.0)
        return moved, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor | None, num: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        x = x.expand(info.batch_size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
        if weight is None or in_dims[1] is None:  # a batch of tokens is just more tokens
            affinity, norm = _BlockAffinity.apply(x.flatten(0, 1), weight, num)
            size = x.shape[:2]
            return (affinity.unflatten(0, size), norm.unflatten(0, size)), (0, 0)
        each = [
            _BlockAffinity.apply(rows, vector, num)
            for rows, vector in zip(x, weight.movedim(in_dims[1], 0), strict=True)
        ]
        affinities, norms = zip(*each, strict=True)
        return (torch.stack(affinities), torch.stack(norms)), (0, 0)


class _Compiled(torch.autograd.Function):
    """The same for `torch.compile`: no blocks and nothing in place, since it fuses by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, num_experts: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.num_experts = num_experts
        return block_affinity_plain(x, weight, num_experts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        return *_differentiable_backward(x, weight, ctx.num_experts, grad), None


def _token_grad(x: Tensor, weight: Tensor | None, scaled: Tensor, pull: Tensor) -> Tensor:
    """``scaled * weight - pull * x``, [T, H] in the dtype of x, a block of rows at a time."""
    result = torch.empty_like(x)
    shape = (scaled.shape[1], x.shape[1] // scaled.shape[1])
    for rows, scaled_rows, pull_rows, out in _blocks(x, scaled, -pull, result):
        same = out.dtype == pull.dtype
        moved = torch.mul(rows, pull_rows, out=out if same else None).unflatten(-1, shape)
        if weight is None:
            moved.add_(scaled_rows[:, :, None])
        else:
            moved.addcmul_(scaled_rows[:, :, None], weight.view(shape))
        if not same:
            out.copy_(moved.flatten(1))
    return result


def _parts(
    x: Tensor, weight: Tensor | None, num_experts: int
) -> tuple[Tensor, tuple[int, int], Tensor, Tensor]:
    """Tokens in the dtype of the computation, shape of the blocks, norms of tokens and blocks."""
    x = x if x.dtype == torch.float64 else x.float()
    shape = (num_experts, x.shape[1] // num_experts)
    unit = torch.as_tensor(_block_norm(weight, shape), dtype=x.dtype, device=x.device)
    return x, shape, x.norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR), unit


def _differentiable_backward(
    x: Tensor, weight: Tensor | None, num_experts: int, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The closed form in operations that autograd knows."""
    dtype = x.dtype
    x, shape, norm, unit = _parts(x, weight, num_experts)
    share = grad * block_affinity_plain(x, weight, num_experts)
    scaled = (grad / (norm * unit))[:, :, None]
    pull = torch.where(norm > NORM_FLOOR, share.sum(-1, keepdim=True) / norm / norm, 0.0)
    if weight is None:
        spread = scaled.expand(-1, *shape)
        return (spread.flatten(1) - pull * x).to(dtype), None
    spread = scaled * weight.unflatten(-1, shape)
    back = torch.where(unit > NORM_FLOOR, share.sum(0) / unit / unit, 0.0)
    gathered = (x.unflatten(-1, shape) * scaled).sum(0) - back[:, None] * weight.unflatten(
        -1, shape
    )
    return (spread.flatten(1) - pull * x).to(dtype), gathered.flatten()
