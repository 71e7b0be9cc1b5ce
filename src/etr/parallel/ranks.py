"""The processes that train together, or this one alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")


class Ranks:
    """The default process group, or one process where none is initialised.

    Everything that ranks tell each other beside weights, gradients and tokens goes through here;
    on one process each method returns at once.

    Args:
        group: ranks that talk; None for this process alone.

    Attributes:
        rank: this process's number.
        size: number of processes.
    """

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of the default process group; its CPU tensors must be able to travel."""
        return cls(dist.group.WORLD if dist.is_initialized() else None)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def aside(self) -> Ranks:
        """The same ranks with a gloo group of their own, for another thread's messages."""
        return Ranks(None if self.group is None else dist.new_group(backend="gloo"))

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, a new tensor; the same on every rank."""
        if self.group is None:
            return values
        values = values.clone()
        dist.all_reduce(values, group=self.group)
        return values

    def sum_numbers(self, values: Sequence[float]) -> list[float]:
        """Sum of each number over ranks, in float64."""
        found: list[float] = self.sum(torch.tensor(values, dtype=torch.float64)).tolist()
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: all then do the same."""
        return self.sum_numbers([float(flag)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def from_first(self, value: T) -> T:
        """The value that rank 0 has."""
        if self.group is None:
            return value
        found = [value]
        dist.broadcast_object_list(found, group_src=0, group=self.group)
        return found[0]
