# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the expert feed-forward. Importing this needs the package triton.

Rows are sorted by expert. A program works on a tile of one expert's rows, which it finds by the
counts on the device, so nothing waits for the host. Rows are read straight from the tokens
("source" index), sums run in float32, and no kernel adds atomically: results are reproducible.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels run in Triton's interpreter, on CPU tensors; fixed at import."""


@triton.jit
def _row_tile(counts, num_experts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert of this row tile (too large: none), its row numbers and which of them exist."""
    tile = tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    count = tl.load(counts + e, mask=e < num_experts, other=0)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int64), 0)
    start = tl.sum(tl.where(e < expert, count, 0), 0)
    size = tl.sum(tl.where(e == expert, count, 0), 0)
    inside = (tile - tl.sum(tl.where(e < expert, tiles, 0), 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    return expert, start + inside, inside < size


@triton.jit
def _load(base, rows, row_mask, columns, num_columns):
    mask = row_mask[:, None] & (columns < num_columns)[None, :]
    return tl.load(base + rows[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, rows, row_mask, columns, width, num_columns, value):
    mask = row_mask[:, None] & (columns < num_columns)[None, :]
    place = base + rows[:, None] * width + columns[None, :]
    tl.store(place, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter cannot multiply bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _product(
    left,
    rows,
    row_mask,
    depth,
    weight,
    columns,
    num_columns,
    stride_depth,
    stride_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows of `left` [., depth] times one expert's matrix, float32 [BLOCK_M, BLOCK_N]."""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, depth, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        a = _load(left, rows, row_mask, ks, depth)
        mask = (ks < depth)[:, None] & (columns < num_columns)[None, :]
        place = weight + ks[:, None] * stride_depth + columns[None, :] * stride_column
        total = _dot(a, tl.load(place, mask=mask, other=0.0), total, PRECISION, UPCAST)
    return total


@triton.jit
def _activate(gate, up, limit, alpha, ACTIVATION: tl.constexpr):
    if ACTIVATION == "swiglu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "clamped_swiglu":
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return gate * tl.sigmoid(alpha * gate) * (up + 1.0)
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return gate * tl.sigmoid(gate)
    else:
        positive = tl.maximum(gate, 0.0)
        return positive * positive


@triton.jit
def _slopes(gate, up, limit, alpha, ACTIVATION: tl.constexpr):
    """Derivatives of the activation by its two arguments (the second: of gated ones alone)."""
    if ACTIVATION == "swiglu":
        s = tl.sigmoid(gate)
        return s * (1.0 + gate * (1.0 - s)) * up, gate * s
    elif ACTIVATION == "clamped_swiglu":
        g = tl.minimum(gate, limit)
        s = tl.sigmoid(alpha * g)
        u = tl.minimum(tl.maximum(up, -limit), limit)
        of_gate = s * (1.0 + alpha * g * (1.0 - s)) * (u + 1.0)
        return tl.where(gate <= limit, of_gate, 0.0), tl.where(u == up, g * s, 0.0)
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        slope = below + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
        return slope, slope
    elif ACTIVATION == "silu":
        s = tl.sigmoid(gate)
        slope = s * (1.0 + gate * (1.0 - s))
        return slope, slope
    else:
        slope = 2.0 * tl.maximum(gate, 0.0)
        return slope, slope


@triton.jit
def up_kernel(
    x,
    up,
    bias,
    source,
    counts,
    hidden,
    active,
    num_experts,
    depth,
    width,
    limit,
    alpha,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """active = activate(x[source] @ up^T + bias), keeping what is activated in `hidden` if asked.

    x [., depth], up [E, 2 width or width, depth], bias [E, 2 width or width], hidden [R, the
    same], active [R, width].
    """
    expert, rows, row_mask = _row_tile(counts, num_experts, BLOCK_E, BLOCK_M)
    if expert >= num_experts:
        return
    at = tl.load(source + rows, mask=row_mask, other=0)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    num_hidden = width
    if GATED:
        num_hidden = 2 * width
    weight = up + expert * num_hidden * depth
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, depth, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        a = _load(x, at, row_mask, ks, depth)
        mask = (ks < depth)[:, None] & (columns < width)[None, :]
        place = weight + columns[None, :] * depth + ks[:, None]
        total = _dot(a, tl.load(place, mask=mask, other=0.0), total, PRECISION, UPCAST)
        if GATED:
            b = tl.load(place + width * depth, mask=mask, other=0.0)
            second = _dot(a, b, second, PRECISION, UPCAST)
    if BIAS:
        place = bias + expert * num_hidden + columns
        total += tl.load(place, mask=columns < width, other=0.0).to(tl.float32)[None, :]
        if GATED:
            place += width
            second += tl.load(place, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    # Backward activates what is kept, so forward does too.
    kept = active.dtype.element_ty
    gate, linear = total.to(kept), second.to(kept)
    if KEEP:
        _store(hidden, rows, row_mask, columns, num_hidden, width, gate)
        if GATED:
            _store(hidden + width, rows, row_mask, columns, num_hidden, width, linear)
    value = _activate(gate.to(tl.float32), linear.to(tl.float32), limit, alpha, ACTIVATION)
    _store(active, rows, row_mask, columns, width, width, value)


@triton.jit
def rows_kernel(
    left,
    weight,
    scale,
    counts,
    out,
    num_experts,
    depth,
    width,
    stride_depth,
    stride_column,
    SCALED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out = scale * (left @ weight of the row's expert); left [R, depth], out [R, width]."""
    expert, rows, row_mask = _row_tile(counts, num_experts, BLOCK_E, BLOCK_M)
    if expert >= num_experts:
        return
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight += expert * depth * width
    total = _product(
        left, rows, row_mask, depth, weight, columns, width, stride_depth, stride_column,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    if SCALED:
        total *= tl.load(scale + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
    _store(out, rows, row_mask, columns, width, width, total)


@triton.jit
def hidden_grad_kernel(
    grad,
    down,
    source,
    scale,
    counts,
    hidden,
    grad_hidden,
    active,
    grad_scale,
    num_experts,
    depth,
    width,
    num_tiles,
    limit,
    alpha,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Everything that follows from g = grad[source] @ down and the kept `hidden`, tile by tile.

    grad [., depth], down [E, depth, width]. Writes grad_hidden (shape of hidden), the scaled
    activation for the gradient of `down` [R, width], and <g, activation> summed over each tile of
    columns, float32 [R, num_tiles].
    """
    expert, rows, row_mask = _row_tile(counts, num_experts, BLOCK_E, BLOCK_M)
    if expert >= num_experts:
        return
    at = tl.load(source + rows, mask=row_mask, other=0)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = _product(
        grad, at, row_mask, depth, down + expert * depth * width, columns, width, width, 1,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    num_hidden = width
    if GATED:
        num_hidden = 2 * width
    mask = row_mask[:, None] & (columns < width)[None, :]
    place = rows[:, None] * num_hidden + columns[None, :]
    gate = tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32)
    linear = gate
    if GATED:
        linear = tl.load(hidden + place + width, mask=mask, other=0.0).to(tl.float32)
    value = _activate(gate, linear, limit, alpha, ACTIVATION)
    if SCALED:
        part = tl.sum(g * value, 1)
        tl.store(grad_scale + rows * num_tiles + tl.program_id(0), part, mask=row_mask)
        weight = tl.load(scale + rows, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        g *= weight
        value *= weight
    _store(active, rows, row_mask, columns, width, width, value)
    slope, slope_up = _slopes(gate, linear, limit, alpha, ACTIVATION)
    if GATED:
        _store(grad_hidden + width, rows, row_mask, columns, num_hidden, width, g * slope_up)
    _store(grad_hidden, rows, row_mask, columns, num_hidden, width, g * slope)


@triton.jit
def outer_kernel(
    left,
    left_source,
    right,
    right_source,
    counts,
    out,
    num_experts,
    height,
    width,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[e] = left[left_source]^T @ right[right_source] over the expert's rows, [height, width].

    BLOCK_K rows at a time; an expert without rows gets zeros.
    """
    expert = tl.program_id(2).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    count = tl.load(counts + e, mask=e < num_experts, other=0)
    start = tl.sum(tl.where(e < expert, count, 0), 0)
    end = start + tl.sum(tl.where(e == expert, count, 0), 0)
    down = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    across = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        mask = rows < end
        a = _load(left, tl.load(left_source + rows, mask=mask, other=0), mask, down, height)
        b = _load(right, tl.load(right_source + rows, mask=mask, other=0), mask, across, width)
        total = _dot(tl.trans(a), b, total, PRECISION, UPCAST)
    _store(out + expert * height * width, down, down < height, across, width, width, total)


@triton.jit
def sum_kernel(rows, rows_by_token, start_of_token, out, width, BLOCK: tl.constexpr):
    """out[t] = sum of the token's rows, in their order; 0 for a token without rows."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(tl.load(start_of_token + token), tl.load(start_of_token + token + 1)):
        row = tl.load(rows_by_token + i)
        total += tl.load(rows + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * width + columns, total.to(out.dtype.element_ty), mask=mask)
