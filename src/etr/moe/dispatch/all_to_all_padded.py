"""The paper's baseline: every (rank, expert) slot travels at full capacity, used or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.dispatch.base import Dispatcher, Steps
from etr.moe.dispatch.permute import Permute
from etr.moe.exchange import Traffic, arrive, depart, exchange_evenly
from etr.moe.experts import ExpertBackend, ExpertParams
from etr.moe.routing import Routing, Selection


@dataclass(frozen=True, kw_only=True)
class AllToAllPadded(Dispatcher):
    """Each expert gets the same number of rows from a rank: its buffer, empty rows included.

    The buffer holds what one rank may send to one expert. Only where capacity is counted per rank
    (no selection group) is that the capacity; over a group it is the capacity of the whole group.
    """

    name = "all_to_all_padded"
    summary = "every (rank, expert) slot at full capacity: the baseline"

    @property
    def padded(self) -> bool:
        return True

    def steps(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        backend: ExpertBackend,
        params: ExpertParams,
        traffic: Traffic,
    ) -> Steps:
        peers, local = traffic.parallel.expert_peers, Permute()
        experts = routing.num_experts // peers.size
        own = torch.full((peers.size, 1), selection.buffer_size, device=x.device)
        slots: list[int] = exchange_evenly(own, peers, traffic).flatten().tolist()
        sends = [experts * selection.buffer_size] * peers.size
        receives = [experts * slot for slot in slots]
        yield
        rows, handle = local.dispatch(x, routing, selection, padded=True)
        there = depart(rows.flatten(0, 1), sends, receives, peers, traffic)
        yield
        parts = arrive(there).split(receives)
        # Rows of one expert stand together: [experts, slots of all ranks, H].
        shapes = [(experts, slot, x.shape[1]) for slot in slots]
        buffer = torch.cat([p.view(s) for p, s in zip(parts, shapes, strict=True)], dim=1)
        counts = torch.full((experts,), sum(slots), device=x.device)
        out = backend.run(buffer if backend.padded else buffer.flatten(0, 1), counts, params)
        out = out.view(buffer.shape)
        rows = torch.cat([part.flatten(0, 1) for part in out.split(slots, dim=1)])
        back = depart(rows, receives, sends, peers, traffic)
        yield
        return local.combine(arrive(back), handle)
