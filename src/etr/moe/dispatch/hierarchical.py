"""Two stages: within the node to the rank in the expert's place, then between nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from etr.moe.dispatch.base import Steps
from etr.moe.dispatch.relay import Relay, relay
from etr.moe.exchange import Traffic
from etr.moe.routing import Routing, Selection

if TYPE_CHECKING:
    from etr.moe.experts import ExpertBackend, ExpertParams


@dataclass(frozen=True, kw_only=True)
class Hierarchical(Relay):
    """Ranks of a node collect what goes to one rank of another: fewer and larger messages."""

    name = "hierarchical"
    summary = "within the node first, then between nodes in fewer and larger messages"

    def steps(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        backend: ExpertBackend,
        params: ExpertParams,
        traffic: Traffic,
    ) -> Steps:
        node, cross = traffic.parallel.node_peers, traffic.parallel.cross_peers
        assert node is not None
        assert cross is not None
        per_rank = routing.num_experts // (node.size * cross.size)
        expert = torch.arange(routing.num_experts, device=x.device)
        rank = expert // per_rank
        place = (rank % node.size, rank // node.size * per_rank + expert % per_rank)
        return relay(x, routing, selection, backend, params, traffic, (node, cross), place)
