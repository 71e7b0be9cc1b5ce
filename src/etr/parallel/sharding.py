"""A model over a mesh of ranks: experts apart, everything else in shares."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from etr.moe import moe_layers
from etr.moe.ranks import ExpertParallel
from etr.moe.topology import Topology
from etr.parallel.config import ParallelConfig
from etr.parallel.ranks import Ranks


def build_mesh(config: ParallelConfig, ranks: Ranks, device_type: str) -> DeviceMesh:
    """The mesh ("data", "expert") over all ranks; consecutive ranks hold different experts.

    Raises:
        ValueError: the number of ranks is not a multiple of expert_ranks.
    """
    if ranks.size % config.expert_ranks:
        raise ValueError(
            f"expert_ranks={config.expert_ranks} must divide the number of ranks, {ranks.size}"
        )
    shape = (ranks.size // config.expert_ranks, config.expert_ranks)
    return init_device_mesh(device_type, shape, mesh_dim_names=("data", "expert"))


def distribute(
    model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, topology: Topology, fsdp: bool
) -> None:
    """Spread `model`, the same on every rank beforehand, over the mesh, in place.

    Each rank keeps the experts of its place on the axis "expert". With `fsdp` these are sharded
    over "data", and all other weights over every rank, block by block; routers alone, which are
    small, stay whole.

    Gradients are plain sums: each rank differentiates its part of a loss that is a sum over ranks,
    and `sum_gradients` after the last backward pass of a step adds what FSDP did not.

    Args:
        model: holds MoE layers.
        blocks: its decoder layers: what is gathered at once.
        mesh: of `build_mesh`.
        topology: which node each rank is on.
        fsdp: shard, beside dividing the experts.
    Raises:
        ValueError: the experts cannot be divided among the ranks.
    """
    layers = moe_layers(model)
    parallel = ExpertParallel.create(mesh, topology, layers[0].config.num_experts)
    for layer in layers:
        layer.distribute(parallel)
    if not fsdp:
        return
    # It warns of in-place changes to what the experts return; the layer makes none.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")
    every = init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=("every",))
    whole = {
        parameter
        for layer in layers
        for parameter in (*layer.router.parameters(), *layer.bank.whole())
    }
    for layer in layers:
        _shard(layer.experts, mesh["data"], whole, inside=True)
    for block in (*blocks, model):
        _shard(block, every, whole)


def _shard(
    module: nn.Module, mesh: DeviceMesh, whole: set[nn.Parameter], inside: bool = False
) -> None:
    """FSDP with plain sums; `inside` cuts every expert where that divides, as a rank may have
    fewer experts than there are replicas."""

    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if inside and parameter.shape[1] % mesh.size() == 0 else None

    fully_shard(module, mesh=mesh, shard_placement_fn=placement, ignored_params=whole)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to divide by one
