"""How the ranks share a model."""

from __future__ import annotations

from dataclasses import dataclass

from etr.moe.checked import check_types


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Layout over the ranks of a launch. On one process only the timeout could matter."""

    expert_ranks: int = 1
    """Consecutive ranks that together hold every expert once; divides the number of ranks and of
    experts. The groups of so many ranks are replicas of the experts."""
    fsdp: bool = True
    """Shard weights, gradients and optimizer over the ranks (FSDP2): dense ones over all, experts
    over their replicas. False: every rank holds the dense weights, and its experts, whole."""
    timeout_seconds: int = 600
    """Longest wait for another rank before the run fails."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("expert_ranks", "timeout_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
