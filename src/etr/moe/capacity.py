"""Capacity policies: how many tokens each expert may keep.

A policy looks at a Routing and returns a Limit; no router computes a capacity. Add a policy: a
frozen config, a module with `limit`, one line in `CAPACITIES`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, overload

import torch
from torch import Tensor

from etr.moe.lower_bound import erfc_bound
from etr.moe.routing import Limit, Routing
from etr.moe.select import RankBy, mass_prefix, select
from etr.moe.state import GlobalState

WARN_AFTER_STEPS = 100


@overload
def capacity_tokens(factor: float, num_tokens: int, top_k: int, num_experts: int) -> int: ...
@overload
def capacity_tokens(
    factor: float | Tensor, num_tokens: Tensor, top_k: int, num_experts: int
) -> Tensor: ...
def capacity_tokens(
    factor: float | Tensor, num_tokens: int | Tensor, top_k: int, num_experts: int
) -> int | Tensor:
    """Capacity of one expert: ``ceil(factor * T * k / E - 1e-6)`` tokens.

    The slack keeps rounding from turning an exact integer into the next one.

    Args:
        factor: capacity factor, no unit; 1 gives every expert the mean load.
        num_tokens: T; an int gives an int, an int64 tensor gives an int64 tensor.
    """
    if isinstance(num_tokens, Tensor):
        return (factor * num_tokens.double() * top_k / num_experts - 1e-6).ceil().long()
    return math.ceil(cast(float, factor) * num_tokens * top_k / num_experts - 1e-6)


def _check_factor(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value} must be a finite number > 0; 1 is the mean load")


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """Options that every policy has."""

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    needs_probs: ClassVar[bool] = False
    needs_score_ranking: ClassVar[bool] = False
    needs_cosine: ClassVar[bool] = False

    min_capacity: int = 1
    """Smallest capacity, tokens per expert."""
    floor: Literal["none", "erfc"] = "none"
    """Raise the capacity to the lower bound of arXiv 2406.00023, Remark 7, at the last step's
    99th percentile of chosen affinities, but never above the mean load."""

    def __post_init__(self) -> None:
        if self.min_capacity < 0:
            raise ValueError(f"min_capacity={self.min_capacity} must be >= 0 tokens")
        if self.floor not in ("none", "erfc"):
            raise ValueError(f"floor={self.floor!r} must be 'none' or 'erfc'")

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> CapacityPolicy:
        """Make the policy's module."""
        raise NotImplementedError


class CapacityPolicy(GlobalState):
    """Base of the policies: applies `min_capacity` and `floor` to what `_limit` returns.

    Args:
        config: the policy's options.
        hidden_size, num_experts, top_k: sizes of the layer.
    """

    def __init__(
        self, config: CapacityConfig, hidden_size: int, num_experts: int, top_k: int
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k

    def limit(self, routing: Routing, threshold: Tensor, affinity_p99: Tensor) -> Limit:
        """What experts may keep of `routing`.

        Args:
            routing: the choices of T tokens.
            threshold: calibrated scores, float32 [E].
            affinity_p99: 99th percentile of chosen scores in the last step, float32 [].
        """
        limit = self._limit(routing, threshold)
        if limit.capacity is None:
            return limit
        least = torch.full_like(limit.capacity, self.config.min_capacity)
        least_buffer = self.config.min_capacity
        if self.config.floor == "erfc":
            mean_load = self._tokens(1.0, routing)
            bound = erfc_bound(self.hidden_size, self.num_experts, affinity_p99).ceil()
            bound = torch.minimum(bound, mean_load.double()).long()
            least = torch.maximum(least, bound)
            least_buffer = max(least_buffer, self._buffer(1.0, routing))
        capacity = torch.maximum(limit.capacity, least)
        buffer = limit.buffer_size
        if buffer is not None:
            buffer = min(max(buffer, least_buffer), routing.num_tokens)
            capacity = capacity.clamp_max(buffer)
        return Limit(capacity=capacity, min_score=limit.min_score, buffer_size=buffer)

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        raise NotImplementedError

    def observe(self, routing: Routing) -> dict[str, Tensor]:
        """Statistics that `after_step` needs, summable over micro-batches and ranks."""
        return {}

    def after_step(self, stats: dict[str, Tensor], affinity_p99: Tensor) -> None:
        """Take in the summed statistics of one optimizer step."""

    def set_progress(self, progress: float) -> None:
        """Learn the fraction of optimizer steps done, in [0, 1]."""

    def _tokens(self, factor: float | Tensor, routing: Routing) -> Tensor:
        """Capacity from the valid tokens, int64 [] on the device."""
        return capacity_tokens(factor, routing.num_valid_tokens(), self.top_k, self.num_experts)

    def _buffer(self, factor: float, routing: Routing) -> int:
        """Static buffer: capacity from the padded count, at most every token."""
        size = capacity_tokens(factor, routing.num_tokens, self.top_k, self.num_experts)
        return min(size, routing.num_tokens)

    def _uniform(self, factor: float | Tensor, routing: Routing, buffer_factor: float) -> Limit:
        return Limit(
            capacity=self._tokens(factor, routing).expand(self.num_experts),
            buffer_size=self._buffer(buffer_factor, routing),
        )


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
        _check_factor("capacity_factor", self.capacity_factor)

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> CapacityPolicy:
        return _FactorPolicy(self, hidden_size, num_experts, top_k)


class _FactorPolicy(CapacityPolicy):
    config: Factor

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        factor = self.config.capacity_factor
        return self._uniform(factor, routing, factor)


@dataclass(frozen=True, kw_only=True)
class Schedule(CapacityConfig):
    """From token choice (large capacity) early to expert choice (small) late.

    The capacity factor stays at `start_factor` until a fraction `start` of training, then moves
    linearly to `end_factor` at `end`, in stages, since each new shape recompiles.
    """

    name = "schedule"
    summary = "capacity factor moves in stages from token choice to expert choice"
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
        _check_factor("start_factor", self.start_factor)
        _check_factor("end_factor", self.end_factor)
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
        self.register_state("progress", (), 0.0)
        self.register_state("step", (), 0, torch.int64)
        self.stage = 0
        self._steps_without_progress = 0

    def state_changed(self) -> None:
        # The stage lives on the host too: static shapes must not wait for the device.
        if not self.progress.is_meta:
            self.stage = self.config.stage(float(self.progress))

    def set_progress(self, progress: float) -> None:
        self.progress.fill_(progress)
        # Through float32, so that a loaded checkpoint lands in the same stage.
        self.stage = self.config.stage(torch.tensor(progress, dtype=torch.float32).item())
        self._steps_without_progress = 0

    def after_step(self, stats: dict[str, Tensor], affinity_p99: Tensor) -> None:
        self.step += 1
        if self.config.steps is not None:
            self.set_progress(min(1.0, int(self.step) / self.config.steps))
            return
        self._steps_without_progress += 1
        if self._steps_without_progress == WARN_AFTER_STEPS:
            warnings.warn(
                f"{WARN_AFTER_STEPS} optimizer steps passed without set_progress: the capacity "
                "schedule stands still; call etr.attach(model, optimizer, total_steps) or give "
                "Schedule(steps=...)",
                stacklevel=2,
            )

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        factor = self.config.factor(self.stage)
        return self._uniform(factor, routing, factor)


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
        if self.mode not in ("ragged", "common"):
            raise ValueError(f"mode={self.mode!r} must be 'ragged' or 'common'")

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
        self.register_state("mass_factor", (), 0.0)
        self._factor = 0.0

    def state_changed(self) -> None:
        if not self.mass_factor.is_meta:
            self._factor = float(self.mass_factor)

    def observe(self, routing: Routing) -> dict[str, Tensor]:
        if self.config.mode == "ragged":
            return {}
        return {"mass_prefix_sum": mass_prefix(routing, self.config.rho).sum()}

    def after_step(self, stats: dict[str, Tensor], affinity_p99: Tensor) -> None:
        if "mass_prefix_sum" not in stats:
            return
        # sum_e n_e / (E * T k / E), over all tokens of the step
        mean_load_sum = stats["num_valid_tokens"] * self.top_k
        if int(mean_load_sum) > 0:
            self.mass_factor.copy_(stats["mass_prefix_sum"] / mean_load_sum)
            self.state_changed()

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        if self.config.mode == "ragged":
            return Limit(capacity=mass_prefix(routing, self.config.rho))
        if self._factor == 0.0:
            return Limit()
        size = self._round_up(self._buffer(self._factor, routing), routing.num_tokens)
        device = routing.expert.device
        return Limit(
            capacity=torch.full((self.num_experts,), size, dtype=torch.int64, device=device),
            buffer_size=size,
        )

    def _round_up(self, tokens: int, num_tokens: int) -> int:
        """Round up to a multiple of max(8, T k / (16 E)), so that few shapes occur."""
        unit = max(8, math.ceil(num_tokens * self.top_k / (16 * self.num_experts)))
        return min(unit * math.ceil(tokens / unit), num_tokens)


@dataclass(frozen=True, kw_only=True)
class Threshold(CapacityConfig):
    """Keep a chooser whose score reaches the expert's threshold: causal, no communication.

    The thresholds are calibrated to what `target` would keep. Shapes are ragged: padded backends
    need a buffer for every token.
    """

    name = "threshold"
    summary = "choosers whose score reaches a calibrated threshold; causal"
    needs_score_ranking = True

    target: Factor | Schedule | AffinityMass = Schedule()
    """The policy to imitate."""

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> CapacityPolicy:
        return _ThresholdPolicy(self, hidden_size, num_experts, top_k)


class _ThresholdPolicy(CapacityPolicy):
    config: Threshold
    num_updates: Tensor

    def __init__(self, config: Threshold, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.target = config.target.build(hidden_size, num_experts, top_k)
        self.register_state("num_updates", (), 0, torch.int64)
        self._calibrated = False

    def state_changed(self) -> None:
        if not self.num_updates.is_meta:
            self._calibrated = bool(self.num_updates > 0)

    @torch.no_grad()
    def observe(self, routing: Routing) -> dict[str, Tensor]:
        kept = select(routing, self._target_limit(routing), rank_by="score").num_tokens_per_expert
        return {"num_target_tokens_per_expert": kept, **self.target.observe(routing)}

    def after_step(self, stats: dict[str, Tensor], affinity_p99: Tensor) -> None:
        self.target.after_step(stats, affinity_p99)
        self.num_updates += 1
        self._calibrated = True

    def set_progress(self, progress: float) -> None:
        self.target.set_progress(progress)

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        if not self._calibrated:  # the first step has no thresholds yet
            return self._target_limit(routing)
        return Limit(min_score=threshold)

    def _target_limit(self, routing: Routing) -> Limit:
        unused = torch.zeros((), device=routing.expert.device)
        return self.target.limit(routing, unused.expand(self.num_experts), unused)


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
        _check_factor("min_factor", self.min_factor)
        _check_factor("max_factor", self.max_factor)
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
        self.register_state("frozen_factor", (), config.max_factor)
        self.register_state("raw_bound", (), math.nan)
        self.register_state("num_updates", (), 0, torch.int64)

    def after_step(self, stats: dict[str, Tensor], affinity_p99: Tensor) -> None:
        if int(self.num_updates) > 0 or int(stats["num_valid_tokens"]) == 0:
            return
        bound = erfc_bound(self.hidden_size, self.num_experts, affinity_p99)
        tokens = stats["num_valid_tokens"] / stats["num_forwards"]
        factor = bound * self.num_experts / (tokens * self.top_k)
        self.raw_bound.copy_(bound)
        self.frozen_factor.copy_(factor.clamp(self.config.min_factor, self.config.max_factor))
        self.num_updates += 1

    def _limit(self, routing: Routing, threshold: Tensor) -> Limit:
        return self._uniform(self.frozen_factor.double(), routing, self.config.max_factor)


CAPACITIES: dict[str, type[CapacityConfig]] = {
    config.name: config for config in (NoLimit, Factor, Schedule, AffinityMass, Threshold, LocMoE)
}
"""Capacity policies by name."""


def refusal(config: CapacityConfig, rank_by: RankBy) -> str | None:
    """Why a policy cannot go with an order of the queue, or None."""
    if config.needs_score_ranking and rank_by != "score":
        return f"capacity {config.name!r} keeps the best choosers, so it needs rank_by='score'"
    return None
