"""The model of a run over the ranks of its launch."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

from etr.hf import EtrForCausalLM
from etr.moe.topology import Topology
from etr.parallel import ParallelConfig, Ranks, build_mesh, distribute, is_launched


def spread(model: EtrForCausalLM, config: ParallelConfig, ranks: Ranks) -> DeviceMesh | None:
    """Divide a model among ranks, in place; on one process it stays as it is.

    Args:
        model: the same on every rank.
        config: how it is divided.
        ranks: all of them call this.
    Returns:
        The mesh, for `sum_gradients`; None on one process.
    Raises:
        ValueError: ranks or experts cannot be divided so.
    """
    if ranks.group is None:
        if config.expert_ranks > 1:
            raise ValueError(
                f"expert_ranks={config.expert_ranks} needs as many processes: launch with "
                "torchrun --nproc-per-node N -m etr train ..."
            )
        return None
    mesh = build_mesh(config, ranks, next(model.parameters()).device.type)
    # Ranks that no launcher started are processes of one machine.
    nodes = Topology.from_environment() if is_launched() else Topology((0,) * ranks.size)
    distribute(model, model.model.layers, mesh, nodes, config.fsdp)
    return mesh
