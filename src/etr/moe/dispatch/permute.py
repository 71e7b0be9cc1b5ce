"""Local dispatch: rows are gathered to their expert and summed back in token order.

Gathering rows of tokens and summing rows into tokens are each other's transpose, so one pair of
autograd functions serves dispatch, combine and both backward passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.moe.routing import Routing, Selection


@dataclass(frozen=True, kw_only=True)
class DispatchHandle:
    """What combine needs to bring rows back.

    Args:
        token_of_row: int64 [R]; ``num_tokens`` marks an empty row of a padded buffer.
        weight_of_row: combine weight of each row, float [R]; 0 for an empty row.
        rows_by_token: row numbers in token order, int64 [R], empty rows last.
        start_of_token: where each token's rows begin in `rows_by_token`, int64 [T + 1].
        num_tokens_per_expert: rows in use of each expert, int64 [E].
        num_tokens: T.
    """

    token_of_row: Tensor
    weight_of_row: Tensor
    rows_by_token: Tensor
    start_of_token: Tensor
    num_tokens_per_expert: Tensor
    num_tokens: int


class Permute:
    """Dispatch on one rank: no communication."""

    name = "permute"

    def dispatch(
        self, x: Tensor, routing: Routing, selection: Selection, *, padded: bool
    ) -> tuple[Tensor, DispatchHandle]:
        """Bring kept tokens to their experts.

        Args:
            x: tokens, float [T, H].
            routing, selection: the pairs and what is kept of them.
            padded: rows as [E, C, H] with C = ``selection.buffer_size``, of static shape and
                without a host synchronisation; otherwise ragged, [R, H] sorted by expert with
                exactly the kept rows, which reads R from the device once.
        """
        handle = _padded_rows(routing, selection) if padded else _ragged_rows(routing, selection)
        rows = _GatherRows.apply(
            x, handle.token_of_row, handle.rows_by_token, handle.start_of_token
        )
        if padded:
            rows = rows.view(routing.num_experts, selection.buffer_size, x.shape[1])
        return rows, handle

    def combine(self, rows: Tensor, handle: DispatchHandle) -> Tensor:
        """Weighted sum of expert outputs in token order, [T, H]; 0 for a token without rows."""
        return _SumRows.apply(
            rows.reshape(-1, rows.shape[-1]),
            handle.weight_of_row.to(rows.dtype),
            handle.token_of_row,
            handle.rows_by_token,
            handle.start_of_token,
        )


def _ragged_rows(routing: Routing, selection: Selection) -> DispatchHandle:
    counts = selection.num_tokens_per_expert
    key = torch.where(selection.kept, routing.expert, routing.num_experts)
    if routing.num_experts < torch.iinfo(torch.int16).max:
        key = key.to(torch.int16)  # sorts several times faster
    pair_of_row = key.argsort(stable=True)[: int(counts.sum())]
    return _handle(
        routing.token[pair_of_row],
        selection.combine_weight[pair_of_row],
        # Pairs are token-major, so sorting by pair is sorting by token.
        pair_of_row.argsort(),
        routing.num_tokens,
        counts,
    )


def _padded_rows(routing: Routing, selection: Selection) -> DispatchHandle:
    capacity = selection.buffer_size
    num_rows = routing.num_experts * capacity
    slot = routing.expert * capacity + selection.position_in_expert
    slot = torch.where(selection.kept, slot, num_rows)
    token_of_row = routing.token.new_full((num_rows + 1,), routing.num_tokens)
    token_of_row = token_of_row.scatter(0, slot, routing.token)[:num_rows]
    weight = selection.combine_weight.new_zeros(num_rows + 1)
    weight = weight.scatter(0, slot, selection.combine_weight)[:num_rows]
    return _handle(
        token_of_row,
        weight,
        token_of_row.argsort(stable=True),
        routing.num_tokens,
        selection.num_tokens_per_expert,
    )


def _handle(
    token_of_row: Tensor, weight: Tensor, rows_by_token: Tensor, num_tokens: int, counts: Tensor
) -> DispatchHandle:
    per_token = torch.zeros(num_tokens + 1, dtype=torch.int64, device=token_of_row.device)
    per_token = per_token.scatter_add(0, token_of_row, torch.ones_like(token_of_row))
    return DispatchHandle(
        token_of_row=token_of_row,
        weight_of_row=weight,
        rows_by_token=rows_by_token,
        start_of_token=per_token.cumsum(0) - per_token,
        num_tokens_per_expert=counts,
        num_tokens=num_tokens,
    )


def _gather(x: Tensor, token_of_row: Tensor) -> Tensor:
    # Empty rows read the last token: whatever they hold, their weight is 0 and they are dropped.
    return x.index_select(0, token_of_row.clamp_max(max(x.shape[0] - 1, 0)))


def _sum(
    rows: Tensor, weight: Tensor | None, rows_by_token: Tensor, start_of_token: Tensor
) -> Tensor:
    if rows.shape[0] == 0:
        return rows.new_zeros(start_of_token.shape[0] - 1, rows.shape[1])
    total = F.embedding_bag(
        rows_by_token,
        rows,
        start_of_token,
        mode="sum",
        per_sample_weights=None if weight is None else weight[rows_by_token],
    )
    return total[:-1]  # the last bag holds the empty rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token_of_row: Tensor, rows_by_token: Tensor, start_of_token: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_by_token, start_of_token)
        return _gather(x, token_of_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum(grad.contiguous(), None, *ctx.saved_tensors), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        token_of_row: Tensor,
        rows_by_token: Tensor,
        start_of_token: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight, token_of_row)
        return _sum(rows, weight, rows_by_token, start_of_token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        rows, weight, token_of_row = ctx.saved_tensors
        grad = _gather(grad.contiguous(), token_of_row)
        return grad * weight[:, None], (grad * rows).sum(-1), None, None, None
