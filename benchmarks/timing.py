"""Interleaved rounds: every system in turn, again and again; ratios are taken within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one system, and its ratio to the floor in the same rounds.

    Args:
        median_seconds: over rounds.
        ratio: median of the per-round ratios to the floor.
        low, high: quartiles of those ratios.
    """

    median_seconds: float
    ratio: float
    low: float
    high: float


def interleaved(
    systems: dict[str, Callable[[], object]], floor: str, rounds: int
) -> dict[str, Timing]:
    """Time every system once per round, after one round that is not counted.

    Args:
        systems: what to call, by name.
        floor: the system that the others are divided by.
        rounds: counted rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, call in systems.items():
            began = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - began)
    result = {}
    for name, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(own, seconds[floor], strict=True))
        quarter = len(ratios) // 4
        result[name] = Timing(
            median_seconds=statistics.median(own),
            ratio=statistics.median(ratios),
            low=ratios[quarter],
            high=ratios[-1 - quarter],
        )
    return result
