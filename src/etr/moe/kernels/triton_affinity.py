# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of the block affinity, top-k and load in one pass over the tokens.

Importing this needs the package triton. Reading x once is all that the router then costs: a float32
copy of it never exists, and the scores are chosen from while they are in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from etr.moe.kernels.block_affinity import NORM_FLOOR

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernel runs in Triton's interpreter, on CPU tensors; fixed at import."""


class Chosen(NamedTuple):
    """Result of `affinity_top_k`.

    Args:
        affinity: cosines, float32 [T, E].
        norm: of each token, at least `NORM_FLOOR`, float32 [T, 1].
        expert: best experts first, int64 [T, k]; equal affinities go to the lower expert.
        num_tokens_per_expert: choices by valid tokens, int64 [E].
    """

    affinity: Tensor
    norm: Tensor
    expert: Tensor
    num_tokens_per_expert: Tensor


@triton.jit
def affinity_kernel(
    x,
    weight,
    unit,
    valid,
    affinity,
    norm,
    expert,
    counts,
    num_tokens,
    num_experts,
    block_width,
    floor,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """See `affinity_top_k`; `unit` [E] holds the norms of the block vectors."""
    tokens = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inside = tokens < num_tokens
    e = tl.arange(0, BLOCK_E)
    sums = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    squares = tl.zeros((BLOCK_T,), dtype=tl.float32)
    hidden_size = num_experts * block_width
    for block in range(num_experts):
        own = tl.zeros((BLOCK_T,), dtype=tl.float32)
        for first in range(0, block_width, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            mask = inside[:, None] & (d < block_width)[None, :]
            place = tokens[:, None] * hidden_size + (block * block_width + d)[None, :]
            values = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
            squares += tl.sum(values * values, 1)
            if WEIGHTED:
                vector = weight + block * block_width + d
                values *= tl.load(vector, mask=d < block_width, other=0.0)[None, :]
            own += tl.sum(values, 1)
        sums = tl.where((e == block)[None, :], own[:, None], sums)
    length = tl.maximum(tl.sqrt(squares), floor)
    units = tl.load(unit + e, mask=e < num_experts, other=1.0)
    scores = sums / (length[:, None] * units[None, :])
    table = inside[:, None] & (e < num_experts)[None, :]
    tl.store(affinity + tokens[:, None] * num_experts + e[None, :], scores, mask=table)
    tl.store(norm + tokens, length, mask=inside)
    counted = tl.load(valid + tokens, mask=inside, other=0) != 0
    left = tl.where((e < num_experts)[None, :], scores, float("-inf"))
    for nth in tl.static_range(TOP_K):
        best = tl.argmax(left, 1, tie_break_left=True)
        tl.store(expert + tokens * TOP_K + nth, best.to(tl.int64), mask=inside)
        # Whole numbers may be added in any order: the counts are reproducible.
        tl.atomic_add(counts + best, 1, mask=inside & counted)
        left = tl.where(e[None, :] == best[:, None], float("-inf"), left)


def affinity_top_k(
    x: Tensor,
    num_experts: int,
    top_k: int,
    *,
    weight: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> Chosen:
    """Block affinities of tokens, their best experts and the load, without a gradient.

    Args:
        x: tokens, float32, bfloat16 or float16 [T, H].
        num_experts: E, a divisor of H.
        top_k: experts per token, at most E.
        weight: block vectors one after another, float32 [H], or None for all ones.
        valid_mask: tokens that count towards the load, bool [T]; None: all.
    """
    num_tokens, block_width = x.shape[0], x.shape[1] // num_experts
    x, device = x.contiguous(), x.device
    unit = torch.full((num_experts,), block_width**0.5, dtype=torch.float32, device=device)
    if weight is not None:
        unit = weight.view(num_experts, block_width).norm(dim=-1).clamp_min(NORM_FLOOR)
    valid = torch.ones(num_tokens, dtype=torch.bool) if valid_mask is None else valid_mask
    found = Chosen(
        affinity=torch.empty(num_tokens, num_experts, dtype=torch.float32, device=device),
        norm=torch.empty(num_tokens, 1, dtype=torch.float32, device=device),
        expert=torch.empty(num_tokens, top_k, dtype=torch.int64, device=device),
        num_tokens_per_expert=torch.zeros(num_experts, dtype=torch.int64, device=device),
    )
    if num_tokens == 0:
        return found
    block_t = 16
    affinity_kernel[(-(-num_tokens // block_t),)](
        *(x, x if weight is None else weight.contiguous(), unit, valid.to(device, torch.uint8)),
        *(*found, num_tokens, num_experts, block_width, NORM_FLOOR),
        TOP_K=top_k,
        WEIGHTED=weight is not None,
        BLOCK_T=block_t,
        BLOCK_E=max(2, 1 << (num_experts - 1).bit_length()),
        BLOCK_D=min(256, max(16, 1 << (block_width - 1).bit_length())),
        num_warps=4,
    )
    return found
