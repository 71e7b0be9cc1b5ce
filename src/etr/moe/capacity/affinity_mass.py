"""Capacity by the share of probability mass that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from etr.moe.capacity.base import CapacityConfig, CapacityPolicy, Ratio
from etr.moe.learner import Seen, Step
from etr.moe.routing import Limit, Routing
from etr.moe.select import mass_prefix


@dataclass(frozen=True, kw_only=True)
class AffinityMass(CapacityConfig):
    """Keep the best choosers that together hold a share of the expert's probability mass.

    "A threshold of the sum of affinity scores" in arXiv 2406.00023; probabilities are summed,
    since cosines can be negative.
    """

    name = "affinity_mass"
    summary = "the best choosers that hold a share rho of the expert's probability mass"
    paper = "2406.00023"
    needs_probs = True
    needs_score_ranking = True

    rho: float = 0.7
    """Share of the choosers' summed probability to keep, in (0, 1]."""
    mode: Literal["ragged", "common"] = "ragged"
    """ragged: each expert its own count. common: one count for all, the mean of the previous
    step, static within a step; the first step drops nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rho <= 1:
            raise ValueError(f"rho={self.rho} must lie in (0, 1]")

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> CapacityPolicy:
        return _AffinityMassPolicy(self, hidden_size, num_experts, top_k)


class _AffinityMassPolicy(CapacityPolicy):
    config: AffinityMass
    mass_factor: Tensor

    def __init__(
        self, config: AffinityMass, hidden_size: int, num_experts: int, top_k: int
    ) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        # Mean prefix over mean load of the previous step; 0 = not seen yet. A factor, so that
        # another batch size keeps its meaning.
        self.register_state("mass_factor", (), 0.0, read=Ratio.of)

    @property
    def observes_choosers(self) -> bool:
        return self.config.mode == "common"

    def observe(self, seen: Seen) -> dict[str, Tensor]:
        if self.config.mode == "ragged":
            return {}
        return {"mass_prefix_sum": mass_prefix(seen.kept.choosers, self.config.rho).sum()}

    def after_step(self, step: Step) -> None:
        stats = step.counters
        if "mass_prefix_sum" not in stats:
            return
        # sum_e n_e / (E * T k / E), over all tokens of the step
        mean_load_sum = stats["num_valid_tokens"] * self.top_k
        if int(mean_load_sum) > 0:
            self.mass_factor.copy_(stats["mass_prefix_sum"].float() / mean_load_sum)
            self.state_changed()  # compiled code takes it for a constant

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        if self.config.mode == "ragged":
            return Limit(capacity=mass_prefix(routing, self.config.rho))
        ratio: Ratio = self.on_host("mass_factor")
        if ratio.numerator == 0:
            return Limit()
        size = self._round_up(self._buffer(ratio, routing), routing.num_tokens)
        device = routing.expert.device
        return Limit(
            capacity=torch.full((self.num_experts,), size, dtype=torch.int64, device=device),
            buffer_size=size,
        )

    def _round_up(self, tokens: int, num_tokens: int) -> int:
        """Round up to a multiple of max(8, T k / (16 E)), so that few shapes occur."""
        unit = max(8, -(-num_tokens * self.top_k // (16 * self.num_experts)))
        return min(unit * -(-tokens // unit), num_tokens)
