"""Two stages: a token crosses to a node once, then fans out to its experts there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from etr.moe.dispatch.relay import Relay, Stages
from etr.moe.ranks import Peers


@dataclass(frozen=True, kw_only=True)
class Dedup(Relay):
    """A token with several experts on a node is sent there once, and one sum comes back."""

    name = "dedup"
    summary = "a token crosses to a node once, then fans out inside it"

    def stages(self, node: Peers, cross: Peers, expert: Tensor) -> Stages:
        per_node = len(expert) // cross.size
        return (cross, node), (expert // per_node, expert % per_node)
