"""Rows of tokens in expert order: where they come from, and how they return.

Gathering rows of tokens and summing rows into tokens are each other's transpose, so one pair of
functions serves dispatch, combine and both backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class DispatchHandle:
    """What combine needs to bring rows back.

    Args:
        token_of_row: int64 [R]; ``num_tokens`` marks an empty row of a padded buffer.
        weight_of_row: combine weight of each row, float [R]; 0 for an empty row.
        rows_by_token: row numbers in token order, int64 [at least R in use]; what follows the
            last token's rows is not read.
        start_of_token: where each token's rows begin in `rows_by_token`, int64 [T + 1].
        num_tokens_per_expert: rows in use of each expert, int64 [E].
        num_tokens: T.
        padded: whether there may be empty rows.
    """

    token_of_row: Tensor
    weight_of_row: Tensor
    rows_by_token: Tensor
    start_of_token: Tensor
    num_tokens_per_expert: Tensor
    num_tokens: int
    padded: bool = True


class Index:
    """Numbers that pick rows of tensors, copied to each device once and not at every use.

    Args:
        numbers: from 0.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)
        self._on: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The numbers on a device, int64 [N]; to be read only."""
        if device in self._on and not torch.compiler.is_compiling():
            return self._on[device]
        with torch.inference_mode(False):
            made = torch.tensor(self.numbers, device=device)
        if type(made) is Tensor and not torch.compiler.is_compiling():  # no fake, no graph's own
            self._on[device] = made
        return made


def expert_of_row(num_tokens_per_expert: Tensor, num_rows: int) -> Tensor:
    """Expert of each of `num_rows` rows that lie in expert order, int64 [R]; nothing waits."""
    expert = torch.arange(len(num_tokens_per_expert), device=num_tokens_per_expert.device)
    return expert.repeat_interleave(num_tokens_per_expert, output_size=num_rows)


def gather_rows(x: Tensor, token_of_row: Tensor, padded: bool = True) -> Tensor:
    """Rows [R, H] of tokens [T, H].

    Empty rows read the last token: whatever they hold, their weight is 0 and they are dropped.

    Args:
        padded: whether there may be empty rows.
    """
    if padded:
        token_of_row = token_of_row.clamp_max(max(x.shape[0] - 1, 0))
    return x.index_select(0, token_of_row)


def sum_rows(
    rows: Tensor, weight: Tensor | None, rows_by_token: Tensor, start_of_token: Tensor
) -> Tensor:
    """Sum of each token's rows [R, H], weighted or not, [T, H]; 0 for a token without rows."""
    if rows.shape[0] == 0:
        return rows.new_zeros(start_of_token.shape[0] - 1, rows.shape[1])
    total = F.embedding_bag(
        rows_by_token,
        rows,
        start_of_token,
        mode="sum",
        per_sample_weights=None if weight is None else weight.index_select(0, rows_by_token),
    )
    return total[:-1]  # the last bag holds what no token owns


class GatherRows(torch.autograd.Function):
    """`gather_rows`, whose gradient is `sum_rows`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token_of_row: Tensor, rows_by_token: Tensor, start_of_token: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_by_token, start_of_token)
        return gather_rows(x, token_of_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return sum_rows(grad.contiguous(), None, *ctx.saved_tensors), None, None, None


class SumRows(torch.autograd.Function):
    """`sum_rows`, whose gradient is `gather_rows`."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        token_of_row: Tensor,
        rows_by_token: Tensor,
        start_of_token: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(None if weight is None else rows, weight, token_of_row)
        return sum_rows(rows, weight, rows_by_token, start_of_token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        rows, weight, token_of_row = ctx.saved_tensors
        grad = gather_rows(grad.contiguous(), token_of_row)
        if weight is None:
            return grad, None, None, None, None
        return grad * weight[:, None], (grad * rows).sum(-1), None, None, None
