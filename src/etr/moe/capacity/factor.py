"""No limit, or one multiple of the mean load for every expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.capacity.base import CapacityConfig, CapacityPolicy, Ratio, check_factor
from etr.moe.routing import Limit, Routing


@dataclass(frozen=True, kw_only=True)
class NoLimit(CapacityConfig):
    """Dropless: every choice is kept."""

    name = "none"
    summary = "dropless: every choice is kept"

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> CapacityPolicy:
        return _NoLimitPolicy(self, hidden_size, num_experts, top_k)


class _NoLimitPolicy(CapacityPolicy):
    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        return Limit()


@dataclass(frozen=True, kw_only=True)
class Factor(CapacityConfig):
    """The same capacity for every expert, a multiple of the mean load."""

    name = "factor"
    summary = "capacity_factor times the mean load"
    paper = "2101.03961"

    capacity_factor: float = 1.1
    """Capacity over mean load, no unit."""
    nulls: int = 0
    """Choices without weights, the last ones, that have another capacity; all together have as much
    (arXiv 2410.07348)."""
    free: float = 1.0
    """Capacity of an expert over that of such a choice, no unit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factor("capacity_factor", self.capacity_factor)
        check_factor("free", self.free)
        if self.nulls < 0:
            raise ValueError(f"nulls={self.nulls} choices without weights must be at least 0")

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> CapacityPolicy:
        if self.nulls >= num_experts:
            raise ValueError(
                f"nulls={self.nulls} of capacity 'factor' must be fewer than the layer's "
                f"{num_experts} choices"
            )
        return _FactorPolicy(self, hidden_size, num_experts, top_k)


class _FactorPolicy(CapacityPolicy):
    config: Factor

    def __init__(self, config: Factor, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.ratio = Ratio.of(config.capacity_factor)
        mean = (config.free * (num_experts - config.nulls) + config.nulls) / num_experts
        each = config.capacity_factor / mean
        self.apart = Ratio.of(config.free * each), Ratio.of(each)

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        nulls = self.config.nulls
        if not nulls:
            return self._uniform(self.ratio, routing, self.ratio)
        weighed, free = (self._tokens(ratio, routing) for ratio in self.apart)
        return Limit(
            capacity=torch.cat([weighed.expand(self.num_experts - nulls), free.expand(nulls)]),
            buffer_size=max(self._buffer(ratio, routing) for ratio in self.apart),
        )
