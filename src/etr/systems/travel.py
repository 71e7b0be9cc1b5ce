"""What tokens travel under a plan: to their experts, and from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.systems.plan import Demand, Devices, Plan


@dataclass(frozen=True, kw_only=True)
class Travel:
    """What tokens travel under a plan, on the trace it is asked of.

    A token lives on the rank that its sequence is on; sequences are dealt out to the ranks in turn.

    Args:
        pairs: choices, each of which sends a token to an expert and back.
        pairs_between_ranks, pairs_between_nodes: those whose expert is elsewhere.
        hops: pairs of choices of one token in neighbouring layers.
        hops_between_ranks, hops_between_nodes: those whose experts are apart.
        load: choices that came to each rank, int64 [L, R].
        flow: hops from each rank to each rank, over all layers, int64 [R, R].
    """

    pairs: int
    pairs_between_ranks: int
    pairs_between_nodes: int
    hops: int
    hops_between_ranks: int
    hops_between_nodes: int
    load: Tensor
    flow: Tensor

    @property
    def max_over_mean(self) -> float:
        """Load of the busiest rank over the mean, in the layer where that is worst."""
        load = self.load.double()
        return float((load.amax(1) / load.mean(1).clamp_min(1e-300)).max())


def hops(demand: Demand) -> Tensor:
    """Each choice of a token with each of its choices in the next layer, int64 [L - 1, E, E].

    Raises:
        ValueError: only counts are known.
    """
    if demand.choices is None:
        raise ValueError("hops between layers need the choices of every token, not counts")
    layers, experts = demand.counts.shape
    found = torch.zeros(layers - 1, experts, experts, dtype=torch.int64)
    for into, first, second in zip(found, demand.choices[:-1], demand.choices[1:], strict=True):
        both = (first >= 0)[:, :, None] & (second >= 0)[:, None, :]
        pairs = (first[:, :, None] * experts + second[:, None, :])[both]
        into.copy_(torch.bincount(pairs, minlength=experts * experts).view(experts, experts))
    return found


def travel(demand: Demand, plan: Plan) -> Travel:
    """Count what tokens travel under a plan.

    Raises:
        ValueError: only counts are known, or the plan is for other sizes.
    """
    choices, sequence, devices = demand.choices, demand.sequence, plan.devices
    if choices is None or sequence is None:
        raise ValueError("travel needs the choices of every token, not counts")
    if plan.rank_of_expert.shape != demand.counts.shape:
        raise ValueError(
            f"the plan is for {_sizes(plan.rank_of_expert)}, the choices for "
            f"{_sizes(demand.counts)}"
        )
    used = choices >= 0
    rank = (
        plan.rank_of_expert[:, None]
        .expand(-1, choices.shape[1], -1)
        .gather(2, choices.clamp_min(0))
    )
    home = (sequence % devices.num_ranks)[None, :, None].expand_as(rank)
    flow = between_ranks(hops(demand), plan.rank_of_expert, devices.num_ranks).sum(0)
    pairs = _apart(home[used], rank[used], devices)
    number = torch.arange(devices.num_ranks)
    apart, node = number[:, None] != number, devices.node_of(number)
    each = zip(rank, used, strict=True)
    return Travel(
        pairs=int(used.sum()),
        pairs_between_ranks=pairs[0],
        pairs_between_nodes=pairs[1],
        hops=int(flow.sum()),
        hops_between_ranks=int(flow[apart].sum()),
        hops_between_nodes=int(flow[node[:, None] != node].sum()),
        load=torch.stack([torch.bincount(r[u], minlength=devices.num_ranks) for r, u in each]),
        flow=flow,
    )


def between_ranks(table: Tensor, rank: Tensor, num_ranks: int) -> Tensor:
    """Hops between experts as hops between ranks, or other groups of experts, int64 [L - 1, R, R].

    Args:
        table: of each expert to each of the next layer, int64 [L - 1, E, E].
        rank: of each expert, int64 [L, E].
        num_ranks: how many there are, R.
    """
    found = torch.zeros(len(table), num_ranks * num_ranks, dtype=torch.int64)
    pair = rank[:-1, :, None] * num_ranks + rank[1:, None, :]
    found.scatter_add_(1, pair.flatten(1), table.flatten(1))
    return found.view(-1, num_ranks, num_ranks)


def _apart(first: Tensor, second: Tensor, devices: Devices) -> tuple[int, int]:
    """How many stand on different ranks, and how many of those on different nodes."""
    ranks = first != second
    nodes = devices.node_of(first) != devices.node_of(second)
    return int(ranks.sum()), int(nodes.sum())


def _sizes(table: Tensor) -> str:
    return f"{table.shape[0]} layers of {table.shape[1]} experts"
