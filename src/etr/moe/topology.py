"""Where experts live: expert -> rank -> node, as explicit values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """On which node each rank of the world runs.

    Args:
        node_of_rank: node of each rank, length of the world.
    """

    node_of_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.node_of_rank:
            raise ValueError("node_of_rank=() is empty; it needs the node of every rank")

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> Topology:
        """What the launcher says: WORLD_SIZE and LOCAL_WORLD_SIZE, as torchrun sets them.

        Args:
            env: the variables; None takes this process's. Without WORLD_SIZE: one rank.
        Raises:
            ValueError: nodes have different numbers of ranks, or RANK does not lie on node
                GROUP_RANK; give `node_of_rank` then.
        """
        env = os.environ if env is None else env
        world = int(env.get("WORLD_SIZE", 1))
        local = int(env.get("LOCAL_WORLD_SIZE", world))
        rank, node = int(env.get("RANK", 0)), env.get("GROUP_RANK")
        if world % local or (node is not None and rank // local != int(node)):
            raise ValueError(
                f"WORLD_SIZE={world}, LOCAL_WORLD_SIZE={local}, RANK={rank}, GROUP_RANK={node} do "
                "not describe equal nodes of consecutive ranks; give Topology(node_of_rank=...)"
            )
        return cls(tuple(r // local for r in range(world)))


@dataclass(frozen=True, kw_only=True)
class ExpertPlacement:
    """Placement of experts on ranks and of ranks on nodes.

    Args:
        rank_of_expert: rank that holds each expert (its replica 0), length E.
        node_of_rank: node of each rank.
    """

    rank_of_expert: tuple[int, ...]
    node_of_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        ranks = range(len(self.node_of_rank))
        if not self.rank_of_expert or not self.node_of_rank:
            raise ValueError("a placement needs at least one expert and one rank")
        for expert, rank in enumerate(self.rank_of_expert):
            if rank not in ranks:
                raise ValueError(
                    f"rank_of_expert[{expert}]={rank} is not a rank: node_of_rank describes "
                    f"{len(ranks)} ranks, 0 to {len(ranks) - 1}"
                )

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int, num_nodes: int) -> ExpertPlacement:
        """Equal blocks of experts on consecutive ranks, equal blocks of ranks on nodes.

        Raises:
            ValueError: a count does not divide evenly.
        """
        if num_nodes < 1 or num_ranks % num_nodes:
            raise ValueError(f"num_ranks={num_ranks} is not a multiple of num_nodes={num_nodes}")
        if num_experts % num_ranks:
            raise ValueError(
                f"num_experts={num_experts} is not a multiple of num_ranks={num_ranks}"
            )
        return cls(
            rank_of_expert=tuple(e * num_ranks // num_experts for e in range(num_experts)),
            node_of_rank=tuple(r * num_nodes // num_ranks for r in range(num_ranks)),
        )

    @property
    def num_experts(self) -> int:
        return len(self.rank_of_expert)

    @property
    def num_nodes(self) -> int:
        return len(set(self.node_of_rank))

    def node_of_expert(self, expert: int) -> int:
        """Node that holds an expert."""
        return self.node_of_rank[self.rank_of_expert[expert]]

    def experts_on_node(self, node: int) -> tuple[int, ...]:
        """Experts whose rank is on `node`."""
        return tuple(e for e in range(self.num_experts) if self.node_of_expert(e) == node)
