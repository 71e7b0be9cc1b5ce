"""Products of rows with the weights of their expert: what tells one backend from another.

Every class does the same arithmetic over [R, .] rows grouped by expert:

    times(rows [R, K], weight [E, K, N]) -> [R, N]     rows of expert e times its matrix
    outer(left [R, N], right [R, K])     -> [E, N, K]  left^T right over the rows of expert e
    spread(values [E, N], num_rows)      -> [R, N]     each row the values of its expert
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.moe.rows import expert_of_row, sum_rows

ONES = 16
"""Columns of the matrix of ones that sums rows: enough bytes for aligned products of any dtype."""


class Products(Protocol):
    """See the module's docstring."""

    def times(self, rows: Tensor, weight: Tensor) -> Tensor: ...

    def outer(self, left: Tensor, right: Tensor) -> Tensor: ...

    def spread(self, values: Tensor, num_rows: int) -> Tensor: ...


def sum_rows_of_experts(products: Products, rows: Tensor) -> Tensor:
    """Sum of each expert's rows, [E, N]: a product with ones, which has a fixed order."""
    return products.outer(rows, rows.new_ones(rows.shape[0], ONES))[:, :, 0]


@dataclass(frozen=True)
class Batched:
    """Padded rows, the same number for every expert."""

    num_experts: int

    def _split(self, rows: Tensor) -> Tensor:
        return rows.view(self.num_experts, -1 if rows.shape[0] else 0, rows.shape[1])

    def times(self, rows: Tensor, weight: Tensor) -> Tensor:
        return self._split(rows).bmm(weight).flatten(0, 1)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        return self._split(left).transpose(1, 2).bmm(self._split(right))

    def spread(self, values: Tensor, num_rows: int) -> Tensor:
        return values.repeat_interleave(num_rows // self.num_experts, 0)


@dataclass(frozen=True)
class Grouped:
    """Rows sorted by expert: `counts` [E] int64 of each, and their running sum `ends` [E] int32."""

    counts: Tensor
    ends: Tensor

    def times(self, rows: Tensor, weight: Tensor) -> Tensor:
        return _grouped(rows, weight, self.ends)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        return _grouped(left.T, right, self.ends)

    def spread(self, values: Tensor, num_rows: int) -> Tensor:
        return values.repeat_interleave(self.counts, 0, output_size=num_rows)


def _grouped(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    if left.device.type == "cpu" and torch.compiler.is_compiling():
        return _grouped_mm(left, right, ends)
    return F.grouped_mm(left, right, offs=ends)


@torch.library.custom_op("etr::grouped_mm", mutates_args=())
def _grouped_mm(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` for compilers, which on a CPU know it of bfloat16 alone."""
    return F.grouped_mm(left, right, offs=ends)


@_grouped_mm.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    if right.dim() == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(ends.shape[0], left.shape[0], right.shape[1])


@dataclass(frozen=True)
class ByRow:
    """Each row beside a copy of its own expert's weights: `counts` [E] int64 rows of each.

    The copies are [R, K, N], which is little for experts of width 1 alone.
    """

    counts: Tensor

    def times(self, rows: Tensor, weight: Tensor) -> Tensor:
        own = weight.index_select(0, expert_of_row(self.counts, rows.shape[0]))
        return rows[:, None].bmm(own).squeeze(1)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        each = (left[:, :, None] * right[:, None]).flatten(1)
        row = torch.arange(each.shape[0], device=each.device)
        start = F.pad(self.counts.cumsum(0), (1, 0))
        found = sum_rows(each, None, row, start)
        return found.view(-1, left.shape[1], right.shape[1])

    def spread(self, values: Tensor, num_rows: int) -> Tensor:
        return values.index_select(0, expert_of_row(self.counts, num_rows))
