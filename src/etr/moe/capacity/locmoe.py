"""LocMoE's capacity: its lower bound, frozen after the first step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.capacity.base import CapacityConfig, CapacityPolicy, Ratio, check_factor
from etr.moe.learner import Step
from etr.moe.lower_bound import erfc_bound
from etr.moe.routing import Limit, Routing


@dataclass(frozen=True, kw_only=True)
class LocMoE(CapacityConfig):
    """LocMoE's capacity: its lower bound at the first step's affinities, then frozen.

    arXiv 2401.13920, Theorem 1, from the 99th percentile of the chosen affinities of the first
    optimizer step. The bound explodes as affinities grow, so the factor is clamped; the raw value
    is recorded in the state.
    """

    name = "locmoe"
    summary = "the lower bound of the first step's affinities, frozen as a capacity factor"
    paper = "2401.13920"
    needs_cosine = True

    min_factor: float = 1.0
    """Smallest capacity factor, no unit."""
    max_factor: float = 1.1
    """Largest capacity factor, no unit; used until the first step is done."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factor("min_factor", self.min_factor)
        check_factor("max_factor", self.max_factor)
        if self.max_factor < self.min_factor:
            raise ValueError(
                f"max_factor={self.max_factor} must be at least min_factor={self.min_factor}"
            )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> CapacityPolicy:
        return _LocMoEPolicy(self, hidden_size, num_experts, top_k)


class _LocMoEPolicy(CapacityPolicy):
    config: LocMoE
    frozen_factor: Tensor
    raw_bound: Tensor
    num_updates: Tensor

    def __init__(self, config: LocMoE, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.most = Ratio.of(config.max_factor)
        self.register_state("frozen_factor", (), config.max_factor)
        self.register_state("raw_bound", (), math.nan)
        self.register_state("num_updates", (), 0, torch.int64)

    def after_step(self, step: Step) -> None:
        if int(self.num_updates) > 0 or int(step.counters["num_valid_tokens"]) == 0:
            return
        bound = erfc_bound(self.hidden_size, self.num_experts, step.affinity_p99)
        counters = step.counters
        tokens = counters["num_valid_tokens"].float() / counters["num_forwards"]
        factor = bound * self.num_experts / (tokens * self.top_k)
        self.raw_bound.copy_(bound)
        self.frozen_factor.copy_(factor.clamp(self.config.min_factor, self.config.max_factor))
        self.num_updates += 1

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        return self._uniform(self.frozen_factor.double(), routing, self.most)
