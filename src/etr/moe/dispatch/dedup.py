"""Two stages: a token crosses to a node once, then fans out to its experts there."""

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
class Dedup(Relay):
    """A token with several experts on a node is sent there once, and one sum comes back."""

    name = "dedup"
    summary = "a token crosses to a node once, then fans out inside it"

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
        per_node = routing.num_experts // cross.size
        expert = torch.arange(routing.num_experts, device=x.device)
        place = (expert // per_node, expert % per_node)
        return relay(x, routing, selection, backend, params, traffic, (cross, node), place)
