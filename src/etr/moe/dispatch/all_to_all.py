"""The plain exchange: kept rows alone travel, unpadded, after their counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.dispatch.base import Dispatcher, Steps
from etr.moe.dispatch.permute import Permute
from etr.moe.exchange import Traffic, arrive, depart, exchange_evenly
from etr.moe.experts import ExpertBackend, ExpertParams
from etr.moe.ranks import Peers
from etr.moe.routing import Routing, Selection
from etr.moe.rows import DispatchHandle, GatherRows


@dataclass(frozen=True, kw_only=True)
class AllToAll(Dispatcher):
    """Each kept row goes straight to its expert's rank and back."""

    name = "all_to_all"
    summary = "kept rows alone, unpadded, straight to their rank"

    def steps(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        backend: ExpertBackend,
        params: ExpertParams,
        traffic: Traffic,
    ) -> Steps:
        peers = traffic.parallel.expert_peers
        return exchange_rows(x, routing, selection, backend, params, peers, traffic)


def exchange_rows(
    x: Tensor,
    routing: Routing,
    selection: Selection,
    backend: ExpertBackend,
    params: ExpertParams,
    peers: Peers,
    traffic: Traffic,
) -> Steps:
    """Dispatch over `peers`, whose ranks hold equal blocks of consecutive experts.

    The host waits for the counts, since the splits of an exchange are numbers on the host.
    """
    local = Permute()
    handle = local.plan(routing, selection, padded=False)
    leaving = selection.num_tokens_per_expert.view(peers.size, -1)  # [rank, its experts]
    arriving = exchange_evenly(leaving, peers, traffic)
    sends, receives = torch.stack((leaving.sum(1), arriving.sum(1))).tolist()
    yield
    rows = GatherRows.apply(x, handle.token_of_row, handle.rows_by_token, handle.start_of_token)
    there = depart(rows, sends, receives, peers, traffic)
    yield
    rows = arrive(there)
    out = backend.run_routed(rows, by_expert(arriving, rows), params)
    back = depart(out, receives, sends, peers, traffic)
    yield
    return local.combine(arrive(back), handle)


def by_expert(arriving: Tensor, rows: Tensor) -> DispatchHandle:
    """Plan that sorts received rows by expert and brings the results into the old order.

    Args:
        arriving: rows from each rank for each of this rank's experts, int64 [ranks, experts].
        rows: [R, H], by rank and then by expert.
    """
    num_rows, device = rows.shape[0], rows.device
    expert = torch.arange(arriving.shape[1], device=device).repeat(arriving.shape[0])
    expert = expert.repeat_interleave(arriving.flatten(), output_size=num_rows)
    order = expert.to(torch.int16).argsort(stable=True)
    number = torch.arange(num_rows + 1, device=device)
    return DispatchHandle(
        token_of_row=order,
        weight_of_row=rows.new_ones(num_rows),
        rows_by_token=torch.empty_like(order).scatter(0, order, number[:-1]),
        start_of_token=number,
        num_tokens_per_expert=arriving.sum(0),
        num_tokens=num_rows,
        padded=False,
    )
