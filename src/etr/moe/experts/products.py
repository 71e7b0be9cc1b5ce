"""Products of rows with the weights of their expert: what tells one backend from another.

Every class does the same arithmetic over [R, .] rows grouped by expert:

    times(rows [R, K], weight [E, K, N]) -> [R, N]     rows of expert e times its matrix
    outer(left [R, N], right [R, K])     -> [E, N, K]  left^T right over the rows of expert e
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F


class Products(Protocol):
    """See the module's docstring."""

    def times(self, rows: Tensor, weight: Tensor) -> Tensor: ...

    def outer(self, left: Tensor, right: Tensor) -> Tensor: ...


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


@dataclass(frozen=True)
class Grouped:
    """Rows sorted by expert; `ends` [E] int32 holds the running sum of rows per expert."""

    ends: Tensor

    def times(self, rows: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(rows, weight, offs=self.ends)

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        return F.grouped_mm(left.T, right, offs=self.ends)
