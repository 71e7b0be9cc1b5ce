"""Tensors that ranks hold in parts, in safetensors files, by torch.distributed.checkpoint.

What one layout of ranks wrote, any other reads: files say which part of a tensor they hold.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from etr.moe.state import GlobalState
from etr.parallel.ranks import Ranks

Tensors = dict[str, Tensor]


class LoadPlanner(dcp.DefaultLoadPlanner):
    """Reads single numbers from checkpoints in which they have no dimension, as earlier ones do.

    dcp.load(tensors, checkpoint_id=folder, planner=LoadPlanner())
    """

    def create_local_plan(self) -> dcp.LoadPlan:
        assert self.metadata is not None
        for name, value in list(self.state_dict.items()):
            saved = self.metadata.state_dict_metadata.get(name)
            no_dimension = isinstance(saved, TensorStorageMetadata) and saved.size == torch.Size()
            if no_dimension and isinstance(value, Tensor) and value.shape == (1,):
                part = value.to_local() if isinstance(value, DTensor) else value
                # The same memory, or some that nobody looks at where another rank has the number.
                self.state_dict[name] = part.view(()) if part.numel() else part.new_empty(())
        return super().create_local_plan()


def model_tensors(model: nn.Module) -> Tensors:
    """Weights and routing state by name, tied ones once; they share memory with the model."""
    found: Tensors = {}
    seen = set[int]()
    # Beside the names this brings FSDP back to the parts that each rank keeps.
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach()
    return found


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's tensors by name, made first for a new one; they share memory with it.

    Numbers such as the learning rate are not part of it: the run's config has them.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def tensors_changed(model: nn.Module) -> None:
    """To be called when the tensors of `model_tensors` have been written to."""
    for module in model.modules():
        if isinstance(module, GlobalState):
            module.state_changed()


def staged(tensors: Tensors) -> Tensors:
    """Copies in the host's memory, so that training can go on while they are written."""
    options = StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
    copies = DefaultStager(options).stage(tensors)
    assert isinstance(copies, dict)
    return copies


def write_tensors(folder: Path, tensors: Tensors, ranks: Ranks) -> None:
    """Write a folder of safetensors files, a file or none a rank.

    Args:
        folder: of these tensors alone, the same on every rank.
        tensors: DTensors are written in parts, others once.
        ranks: all of them call this.
    Raises:
        CheckpointException: on every rank, with each rank's own error.
    """
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _quietly():
        dcp.save(tensors, storage_writer=writer, **_among(ranks))


def read_tensors(folder: Path, names: Sequence[str], tensors: Tensors, ranks: Ranks) -> None:
    """Fill tensors in place from safetensors files; others in the folder are not looked at.

    Args:
        folder: of the files, the same on every rank.
        names: of the files.
        tensors: filled in place.
        ranks: all of them call this.
    Raises:
        CheckpointException: a tensor is missing, or its shape is another.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    reader.fs = _Named(names)
    with _quietly():
        dcp.load(tensors, storage_reader=reader, planner=LoadPlanner(), **_among(ranks))


class _Named(FileSystem):
    """A file system whose folders hold the named files and nothing else."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return [str(Path(path) / name) for name in self._names]


def _among(ranks: Ranks) -> dict[str, Any]:
    return {"process_group": ranks.group, "no_dist": ranks.group is None}


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide the warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
