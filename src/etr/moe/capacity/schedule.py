"""A capacity factor that moves over training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.capacity.base import CapacityConfig, CapacityPolicy, Ratio, check_factor
from etr.moe.learner import Step
from etr.moe.notice import warn
from etr.moe.routing import Limit, Routing

WARN_AFTER_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Schedule(CapacityConfig):
    """From token choice (large capacity) early to expert choice (small) late, or the other way.

    The capacity factor stays at `start_factor` until a fraction `start` of training, then moves
    linearly to `end_factor` at `end`, in stages, since each new shape recompiles.
    """

    name = "schedule"
    summary = "capacity factor moves in stages over training"
    paper = "2406.00023"

    start_factor: float = 1.1
    """Capacity factor at the beginning, no unit."""
    end_factor: float = 0.6
    """Capacity factor at the end, no unit."""
    start: float = 0.1
    """Fraction of optimizer steps at which the move begins."""
    end: float = 0.7
    """Fraction of optimizer steps at which the move ends."""
    num_stages: int = 16
    """Distinct capacity factors on the way."""
    steps: int | None = None
    """Optimizer steps of the whole training, where nothing calls `set_progress`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_factor("start_factor", self.start_factor)
        check_factor("end_factor", self.end_factor)
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"start={self.start}, end={self.end} must be fractions of training with "
                "0 <= start <= end <= 1"
            )
        if self.num_stages < 2:
            raise ValueError(f"num_stages={self.num_stages} must be at least 2")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1 optimizer step, or None")

    def stage(self, progress: float) -> int:
        """Stage at a fraction of training, in [0, num_stages)."""
        if progress >= self.end:
            return self.num_stages - 1
        if progress <= self.start:
            return 0
        done = (progress - self.start) / (self.end - self.start)
        return min(int(done * self.num_stages), self.num_stages - 1)

    def factor(self, stage: int) -> float:
        """Capacity factor of a stage."""
        share = stage / (self.num_stages - 1)
        return self.start_factor + (self.end_factor - self.start_factor) * share

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> CapacityPolicy:
        return _SchedulePolicy(self, hidden_size, num_experts, top_k)


class _SchedulePolicy(CapacityPolicy):
    config: Schedule
    progress: Tensor
    step: Tensor

    def __init__(self, config: Schedule, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        # The host must know the stage: static shapes cannot wait for the device.
        self.register_state("progress", (), 0.0, read=config.stage)
        self.register_state("step", (), 0, torch.int64)
        self.ratios = [Ratio.of(config.factor(stage)) for stage in range(config.num_stages)]
        self._steps_without_progress = 0

    @property
    def stage(self) -> int:
        """Stage of the schedule that `progress` is in."""
        stage: int = self.on_host("progress")
        return stage

    def set_progress(self, progress: float) -> None:
        self.progress.fill_(progress)
        # Through float32, so that a loaded checkpoint lands in the same stage.
        rounded = torch.tensor(progress, dtype=torch.float32).item()
        self.set_on_host("progress", self.config.stage(rounded))
        self._steps_without_progress = 0

    def after_step(self, step: Step) -> None:
        self.step += 1
        if self.config.steps is not None:
            self.set_progress(min(1.0, int(self.step) / self.config.steps))
            return
        self._steps_without_progress += 1
        if self._steps_without_progress == WARN_AFTER_STEPS:
            warn(
                f"{WARN_AFTER_STEPS} optimizer steps passed without set_progress: the capacity "
                "schedule stands still; call etr.attach(model, optimizer, total_steps) or give "
                "Schedule(steps=...)"
            )

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        ratio = self.ratios[self.stage]
        return self._uniform(ratio, routing, ratio)
