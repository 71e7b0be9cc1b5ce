"""Two stages: within the node to the rank in the expert's place, then between nodes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from etr.moe.dispatch.relay import Relay, Stages
from etr.moe.ranks import Peers


@dataclass(frozen=True, kw_only=True)
class Hierarchical(Relay):
    """Ranks of a node collect what goes to one rank of another: fewer and larger messages."""

    name = "hierarchical"
    summary = "within the node first, then between nodes in fewer and larger messages"

    def stages(self, node: Peers, cross: Peers, expert: Tensor) -> Stages:
        per_rank = len(expert) // (node.size * cross.size)
        rank = expert // per_rank
        place = (rank % node.size, rank // node.size * per_rank + expert % per_rank)
        return (node, cross), place
