"""No limit, or one multiple of the mean load for every expert."""

from __future__ import annotations

from dataclasses import dataclass

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

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factor("capacity_factor", self.capacity_factor)

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> CapacityPolicy:
        return _FactorPolicy(self, hidden_size, num_experts, top_k)


class _FactorPolicy(CapacityPolicy):
    config: Factor

    def __init__(self, config: Factor, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.ratio = Ratio.of(config.capacity_factor)

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        return self._uniform(self.ratio, routing, self.ratio)
