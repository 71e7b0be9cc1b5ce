"""Rows between ranks: who exchanges with whom, what is under way, and how many bytes of it.

An exchange is a pair of autograd functions. `depart` starts it and `arrive` waits for it, and in
the backward pass `arrive` starts the way back and `depart` waits: what is computed between the two
is computed while rows travel, in both passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from etr.moe.capacity import capacity_tokens
from etr.moe.ranks import ExpertParallel, Peers
from etr.moe.routing import Routing

T = TypeVar("T")
BASELINE_FACTOR = 1.1
"""Capacity factor of the padded baseline that traffic is compared with."""


class Traffic:
    """One forward's use of the ranks of `parallel`: bytes that this rank sends to others.

    Args:
        parallel: ranks and groups.
        checked: the layer's name, where ranks are to make sure before each exchange that all of
            them are at the same one; None does without.

    Attributes:
        within_node, between_nodes: bytes sent so far; what a rank sends to itself is free.
        between_nodes_padded: what the baseline would have sent between nodes instead.
    """

    def __init__(self, parallel: ExpertParallel, checked: str | None = None) -> None:
        self.parallel, self._checked, self._exchanges = parallel, checked, 0
        self.within_node = self.between_nodes = self.between_nodes_padded = 0

    def next_exchange(self) -> str | None:
        """Name of the forward's next exchange, the same on every rank; None if unchecked."""
        self._exchanges += 1
        return self._checked and f"exchange {self._exchanges} of {self._checked}"

    def count(self, rows: Sequence[int], row_bytes: int, peers: Peers) -> None:
        """Count `rows[r]` rows sent to each rank r."""
        own = peers.node_of_rank[peers.rank]
        for rank, (number, node) in enumerate(zip(rows, peers.node_of_rank, strict=True)):
            if node != own:
                self.between_nodes += number * row_bytes
            elif rank != peers.rank:
                self.within_node += number * row_bytes

    def count_padded(self, x: Tensor, routing: Routing) -> None:
        """Count what the baseline would send between nodes for the tokens [T, H], both ways.

        It pads each expert's rows from this rank to `BASELINE_FACTOR` times the mean load.
        """
        placement, own = self.parallel.placement, self.parallel.expert_peers
        node = own.node_of_rank[own.rank]
        far = routing.num_experts - len(placement.experts_on_node(node))
        slot = capacity_tokens(
            BASELINE_FACTOR, routing.num_tokens, routing.top_k, routing.num_experts
        )
        self.between_nodes_padded += 2 * far * slot * x.shape[1] * x.element_size()

    def add_to(self, stats: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counters of this rank so that the sum over all ranks is that of one rank.

        A forward counts once for its selection group, over which losses are means. Ranks that hold
        the same tokens count them once, but the bytes of each.
        """
        group, twins = self.parallel.selection_peers, self.parallel.tensor_peers
        like = stats["num_forwards"]
        found = dict(stats)
        if group is not None:
            found["num_forwards"] = like * int(group.rank == 0)
            found |= {k: v / group.size for k, v in stats.items() if k.startswith("loss_")}
        if twins is not None and twins.rank > 0:
            found = {name: torch.zeros_like(value) for name, value in found.items()}
        return found | {
            "bytes_within_node": like.new_tensor(self.within_node),
            "bytes_between_nodes": like.new_tensor(self.between_nodes),
            "bytes_between_nodes_padded": like.new_tensor(self.between_nodes_padded),
        }


class Pending(NamedTuple):
    """Rows under way: memory that is being filled, and the exchange that fills it."""

    rows: Tensor
    flight: _Flight


def depart(
    rows: Tensor, sends: list[int], receives: list[int], peers: Peers, traffic: Traffic
) -> Pending:
    """Start sending rows; the ranks' shares may be uneven or empty.

    Args:
        rows: [sum(sends), ...], by rank that they go to.
        sends, receives: rows to and from each rank.
    """
    traffic.count(sends, rows[:1].numel() * rows.element_size() if len(rows) else 0, peers)
    flight = _Flight(sends, receives, peers, traffic.next_exchange())
    return Pending(_Depart.apply(rows, flight), flight)


def arrive(pending: Pending) -> Tensor:
    """Wait for the rows of `depart`, [sum(receives), ...] by rank that they come from."""
    return _Arrive.apply(*pending)


def exchange_evenly(values: Tensor, peers: Peers, traffic: Traffic) -> Tensor:
    """Send `values[r]` to each rank r at once; no gradient.

    Args:
        values: [ranks, ...].
    Returns:
        The same shape: what each rank sent here.
    """
    traffic.count([1] * peers.size, values[0].numel() * values.element_size(), peers)
    _meet(traffic.next_exchange(), "forward")
    found = torch.empty_like(values, memory_format=torch.contiguous_format)
    dist.all_to_all_single(found, values.contiguous(), group=peers.group)
    return found


def rows_of_all(rows: Tensor, peers: Peers, traffic: Traffic) -> Tensor:
    """Rows [T, ...] of all ranks, by rank that they come from. The host waits for their numbers.

    A row's gradient is the sum of those that all ranks have for it.
    """
    own = torch.full((peers.size, 1), len(rows), device=rows.device)
    counts = exchange_evenly(own, peers, traffic).flatten().tolist()
    to_each = rows.expand(peers.size, *rows.shape).flatten(0, 1)
    return arrive(depart(to_each, [len(rows)] * peers.size, counts, peers, traffic))


class _Flight:
    """One exchange, there in the forward pass and back in the backward pass."""

    def __init__(
        self, sends: list[int], receives: list[int], peers: Peers, name: str | None
    ) -> None:
        self.sends, self.receives, self.group, self.name = sends, receives, peers.group, name
        self.under_way: Any = None

    def start(self, rows: Tensor, *, back: bool) -> Tensor:
        sends, receives = (self.receives, self.sends) if back else (self.sends, self.receives)
        _meet(self.name, "backward" if back else "forward")
        rows = rows.contiguous()
        found = rows.new_empty(sum(receives), *rows.shape[1:])
        work = dist.all_to_all_single(found, rows, receives, sends, group=self.group, async_op=True)
        self.under_way = work, rows, found  # the rows must live until they are sent
        return found

    def wait(self) -> Tensor:
        work, _, found = self.under_way
        self.under_way = None
        work.wait()
        return found


def meet(place: str, value: T) -> list[T]:
    """Wait for all ranks, and refuse to go on unless they are at the same place.

    Args:
        place: where this rank is, in words.
        value: what the others are told.
    Returns:
        Every rank's value, by rank.
    Raises:
        RuntimeError: on every rank, naming where each one is.
    """
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (place, value))
    if len({there for there, _ in told}) > 1:
        found = "; ".join(f"rank {rank}: {there}" for rank, (there, _) in enumerate(told))
        raise RuntimeError(
            f"ranks are at different places ({found}); every rank must run forward and backward of "
            "the same layers in the same order, a rank without tokens too"
        )
    return [value for _, value in told]


def _meet(name: str | None, direction: str) -> None:
    if name is not None:
        meet(f"{direction}, {name}", None)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.start(rows, back=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.wait(), None  # not `grad`: see `_Arrive`


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.flight.start(grad, back=True)
        # What is on its way has another number of rows than autograd expects here, so `_Depart`
        # takes it from the flight.
        return grad, None
