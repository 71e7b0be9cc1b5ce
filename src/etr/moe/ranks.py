"""Which ranks there are, on which nodes, and what they do together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch.distributed as dist

from etr.moe.context import RoutingContext
from etr.moe.topology import ExpertPlacement, Topology

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

DIMENSIONS = ("data", "expert", "tensor")


@dataclass(frozen=True, kw_only=True)
class Peers:
    """Ranks that exchange with each other.

    Args:
        group: their process group.
        rank: this rank's number in the group.
        node_of_rank: node of each rank of the group.
    """

    group: ProcessGroup
    rank: int
    node_of_rank: tuple[int, ...]

    @classmethod
    def of(cls, group: ProcessGroup, topology: Topology) -> Peers:
        """The ranks of `group`, on the nodes that the topology gives them."""
        ranks = dist.get_process_group_ranks(group)
        return cls(
            group=group,
            rank=dist.get_rank(group),
            node_of_rank=tuple(topology.node_of_rank[r] for r in ranks),
        )

    @property
    def size(self) -> int:
        return len(self.node_of_rank)


@dataclass(frozen=True, kw_only=True)
class ExpertParallel:
    """Where a layer's experts are, and which ranks do what together. Make it with `create`.

    Args:
        mesh: the expert group, one-dimensional: its ranks together hold every expert once.
        topology: node of every rank of the world.
        placement: where the experts are; ranks are those of the expert group.
        selection_group: ranks that feed the same micro-batch: an expert's rivals are their
            tokens. None: this rank alone.
        data_group: ranks whose tokens the balance loss counts. None: this rank alone.
        node_group: ranks of this node, for the locality loss.
        tensor_group: ranks that hold the same tokens, or None.
        node_peers: ranks of the expert group on this node, and `cross_peers` those in this rank's
            place on every node; None where nodes differ in size or are not consecutive.
    """

    mesh: DeviceMesh
    topology: Topology
    placement: ExpertPlacement
    selection_group: ProcessGroup | None
    data_group: ProcessGroup | None
    node_group: ProcessGroup | None
    tensor_group: ProcessGroup | None = None
    node_peers: Peers | None = None
    cross_peers: Peers | None = None

    @classmethod
    def create(cls, mesh: DeviceMesh, topology: Topology, num_experts: int) -> ExpertParallel:
        """Build the groups, once for all layers. Every rank of the world must call this.

        The selection group is all ranks of the world, one of each tensor group;
        ``dataclasses.replace(parallel, selection_group=None)`` counts capacity per rank.

        Args:
            mesh: one-dimensional, the expert group; or with the dimensions "expert" and any of
                "data" (replicas of the experts, other tokens) and "tensor" (replicas, the same
                tokens).
            topology: node of every rank of the world.
            num_experts: E, a multiple of the ranks of the expert group.
        Raises:
            ValueError: no process group is initialised, sizes do not fit, or dimensions are
                unknown.
        """
        world = _check(mesh, topology)
        names = mesh.mesh_dim_names or ()
        many = mesh.ndim > 1
        expert_mesh = mesh["expert"] if many else mesh
        ranks = expert_mesh.mesh.tolist()
        nodes = tuple(topology.node_of_rank[r] for r in ranks)
        if num_experts % len(ranks):
            raise ValueError(
                f"num_experts={num_experts} is not a multiple of the {len(ranks)} ranks of the "
                "expert group: each rank holds the same number of experts"
            )
        placement = ExpertPlacement(
            rank_of_expert=tuple(e * len(ranks) // num_experts for e in range(num_experts)),
            node_of_rank=nodes,
        )
        group, tensor_group = dist.group.WORLD, None
        if many and "tensor" in names:
            tensor_group = mesh["tensor"].get_group()
            twins = mesh.mesh.select(names.index("tensor"), mesh["tensor"].get_local_rank())
            group = _group(sorted(twins.flatten().tolist()))
            world = dist.get_process_group_ranks(group)
        own = topology.node_of_rank[dist.get_rank()]
        node_peers, cross_peers = _grid(ranks, nodes, topology)
        return cls(
            mesh=expert_mesh,
            topology=topology,
            placement=placement,
            selection_group=group,
            data_group=group,
            node_group=_group([r for r in world if topology.node_of_rank[r] == own]),
            tensor_group=tensor_group,
            node_peers=node_peers,
            cross_peers=cross_peers,
        )

    def __deepcopy__(self, memo: dict[int, object]) -> ExpertParallel:
        return self  # groups are of the process: copies of a layer work with the same ranks

    @cached_property
    def expert_peers(self) -> Peers:
        """The ranks that together hold every expert."""
        return Peers.of(self.mesh.get_group(), self.topology)

    @cached_property
    def selection_peers(self) -> Peers | None:
        """The ranks over whose tokens experts choose."""
        group = self.selection_group
        return None if group is None else Peers.of(group, self.topology)

    @cached_property
    def tensor_peers(self) -> Peers | None:
        """The ranks that hold the same tokens."""
        group = self.tensor_group
        return None if group is None else Peers.of(group, self.topology)

    def fill(self, context: RoutingContext) -> RoutingContext:
        """`context` with this placement and these groups where it gives none."""
        given = context.placement is not None
        return dataclasses.replace(
            context,
            placement=context.placement if given else self.placement,
            rank=context.rank if given else self.expert_peers.rank,
            data_group=context.data_group or self.data_group,
            node_group=context.node_group or self.node_group,
        )


def _check(mesh: DeviceMesh, topology: Topology) -> list[int]:
    """Ranks of the world, if all fits."""
    if not dist.is_initialized():
        raise ValueError(
            "experts cannot be spread over ranks before a process group is initialised: call "
            "torch.distributed.init_process_group on every rank first"
        )
    size = dist.get_world_size()
    if len(topology.node_of_rank) != size:
        raise ValueError(
            f"topology.node_of_rank describes {len(topology.node_of_rank)} ranks; the world has "
            f"{size}"
        )
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and ("expert" not in names or not set(names) <= set(DIMENSIONS)):
        raise ValueError(
            f"mesh_dim_names={names} must hold 'expert' and may hold 'data' and 'tensor'"
        )
    return list(range(size))


def _grid(
    ranks: list[int], nodes: tuple[int, ...], topology: Topology
) -> tuple[Peers | None, Peers | None]:
    """Peers on this rank's node and across nodes, where the expert group is an even grid."""
    width = nodes.count(nodes[0])
    place = ranks.index(dist.get_rank())
    rows = [nodes[start : start + width] for start in range(0, len(nodes), width)]
    even = all(len(row) == width and len(set(row)) == 1 for row in rows)
    if not even or len({row[0] for row in rows}) != len(rows):
        return None, None
    first = place - place % width
    node_ranks, cross_ranks = ranks[first : first + width], ranks[place % width :: width]
    return (
        Peers.of(_group(node_ranks), topology),
        Peers.of(_group(cross_ranks), topology),
    )


def _group(ranks: list[int]) -> ProcessGroup:
    """A new group of these ranks, which alone need to ask for it."""
    return dist.new_group(ranks, use_local_synchronization=True)
