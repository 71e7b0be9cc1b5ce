"""Causal selection in training: thresholds in the place of a capacity."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from etr.moe.capacity.affinity_mass import AffinityMass
from etr.moe.capacity.base import CapacityConfig, CapacityPolicy
from etr.moe.capacity.factor import Factor
from etr.moe.capacity.schedule import Schedule
from etr.moe.learner import Seen, Step
from etr.moe.routing import Limit, Routing
from etr.moe.select import select


@dataclass(frozen=True, kw_only=True)
class Threshold(CapacityConfig):
    """Keep a chooser whose score reaches the expert's threshold: causal, no communication.

    The thresholds are calibrated to what `target` would keep. Shapes are ragged: padded backends
    need a buffer for every token.
    """

    name = "threshold"
    summary = "choosers whose score reaches a calibrated threshold; causal"
    needs_score_ranking = True

    target: Factor | Schedule | AffinityMass = field(default_factory=Schedule)
    """The policy to imitate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor != "none" or self.target.floor != "none":
            raise ValueError(
                "floor='erfc' does not go with thresholds: a score to reach bounds no count"
            )
        if self.min_capacity != 1:
            raise ValueError(
                f"min_capacity={self.min_capacity} does not go with thresholds; give it to target"
            )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> CapacityPolicy:
        return _ThresholdPolicy(self, hidden_size, num_experts, top_k)


class _ThresholdPolicy(CapacityPolicy):
    config: Threshold
    num_updates: Tensor

    def __init__(self, config: Threshold, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.target = config.target.build(hidden_size, num_experts, top_k)
        self.register_state("num_updates", (), 0, torch.int64, read=bool)

    @property
    def needs_probs(self) -> bool:
        return self.target.needs_probs

    @property
    def observes_choosers(self) -> bool:
        return True

    @torch.no_grad()
    def observe(self, seen: Seen) -> dict[str, Tensor]:
        choosers = seen.kept.choosers
        kept = select(choosers, self._target_limit(choosers), rank_by="score").num_tokens_per_expert
        return {"num_target_tokens_per_expert": kept, **self.target.observe(seen)}

    def imitated_limit(self, routing: Routing, threshold: Tensor, affinity_p99: Tensor) -> Limit:
        return self._target_limit(routing)

    def after_step(self, step: Step) -> None:
        self.target.after_step(step)
        self.num_updates += 1
        self.set_on_host("num_updates", True)

    def set_progress(self, progress: float) -> None:
        self.target.set_progress(progress)

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        if not self.on_host("num_updates"):  # the first step has no thresholds yet
            return self._target_limit(routing)
        return Limit(min_score=threshold)

    def _target_limit(self, routing: Routing) -> Limit:
        unused = torch.zeros((), dtype=torch.float32, device=routing.expert.device)
        return self.target.limit(routing, unused.expand(self.num_experts), unused)
