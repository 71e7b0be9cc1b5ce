"""Gradients of a model that is spread over ranks: their sums, norms and clipping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from etr.parallel.ranks import Ranks


def sum_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Sum gradients over the ranks that hold the same weights, where FSDP has not done so.

    Args:
        model: of `distribute`, after the last backward pass of a step.
        mesh: of `build_mesh`.
    """
    waiting = []
    for parameter in model.parameters():
        group = None if parameter.grad is None else _copies(parameter.grad, mesh)
        if group is not None:
            assert parameter.grad is not None
            part = local_part(parameter.grad)
            waiting.append(dist.all_reduce(part, group=group, async_op=True))
    for work in waiting:
        work.wait()


def _copies(gradient: Tensor, mesh: DeviceMesh) -> ProcessGroup | None:
    """Ranks that hold other gradients of the same weights; None where FSDP added them up."""
    if not isinstance(gradient, DTensor):
        return dist.group.WORLD
    divided = gradient.device_mesh.mesh_dim_names == ("expert",)
    return mesh.get_group("data") if divided else None


@torch.no_grad()
def gradient_norms(groups: Sequence[Iterable[nn.Parameter]], ranks: Ranks) -> list[float]:
    """Norm of the whole gradient of each group of parameters, wherever its parts are.

    One sum over ranks in all, in float64; 0 for parameters without a gradient.
    """
    squares = [sum(_square(p.grad, ranks) for p in group if p.grad is not None) for group in groups]
    return [square**0.5 for square in ranks.sum_numbers([float(square) for square in squares])]


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, ranks: Ranks) -> float:
    """Scale a gradient down to a norm of `max_norm` at most; returns its norm before that."""
    parameters = list(parameters)
    (norm,) = gradient_norms([parameters], ranks)
    gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, min(1.0, max_norm / (norm + 1e-6)))
    return norm


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _square(gradient: Tensor, ranks: Ranks) -> Tensor:
    """Sum of squares of this rank's part, divided by the number of ranks that hold the same."""
    shards = 1
    if isinstance(gradient, DTensor):
        mesh = gradient.device_mesh
        for axis, placement in enumerate(gradient.placements):
            shards *= 1 if placement.is_replicate() else mesh.size(axis)
    norm = torch.linalg.vector_norm(local_part(gradient), dtype=torch.float64)
    return norm.square() * shards / ranks.size
