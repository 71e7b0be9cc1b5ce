"""Means and sums over tokens and experts, of which ranks hold a part each.

Every mean is a sum over valid tokens divided by their global number. Where ranks share a group,
each rank's loss is scaled so that the *average* over the group's ranks (what DDP and FSDP compute
from gradients) equals the loss of one rank that holds all tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from etr.moe.routing import Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def sum_over_group(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """All-reduced copy of `value` without gradient; `value` itself without a group."""
    value = value.detach()
    if group is None:
        return value
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value


def mean_over_valid(
    values: Tensor, routing: Routing, group: ProcessGroup | None, average_ranks: bool = True
) -> Tensor:
    """Mean of per-token values over the group's valid tokens.

    With `average_ranks` only this rank's part is returned, times the number of ranks, so that the
    average over ranks is the mean. Without, every rank gets the whole value, and a gradient that
    is whole after averaging over all ranks.

    Args:
        values: float [T] or [T, N].
        routing: says which tokens are valid.
        group: ranks that share the mean; None for this one.
    """
    if not routing.full:
        mask = routing.valid_mask if values.dim() == 1 else routing.valid_mask[:, None]
        values = values.masked_fill(~mask, 0.0)
    local = values.sum(0)
    if group is None and routing.full:
        return local / max(routing.num_tokens, 1)
    count = sum_over_group(routing.num_valid_tokens(), group).clamp_min(1)
    if group is None:
        return local / count
    if average_ranks:
        return dist.get_world_size(group) * local / count
    return whole_over_group(local, group) / count


def whole_over_group(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks of a group, the same on each, of what each computed from its own part.

    The gradient is whole after averaging over ranks: of tokens, or of the experts that ranks hold.
    """
    if group is None:
        return local
    # Each of the group's ranks returns the same value, and each depends on this rank's part:
    # `ranks * local` carries all those gradients without a collective in the backward pass.
    whole = sum_over_group(local, group)
    ranks = dist.get_world_size(group)
    return ranks * local + (whole - ranks * local).detach()
