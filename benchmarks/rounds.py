"""Interleaved rounds: every system in turn, again and again, so that a drift meets all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Seconds = dict[str, float]
"""Seconds by measure: forward, forward+backward, ..."""
SLOW = 4.0
"""A system this many times slower than the median one runs in every fourth round only."""
STRIDE = 4
PATIENCE = 4.0
"""The least number of rounds may take so many budgets; else there is one round fewer."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How often each system runs.

    Args:
        rounds: rounds of a case.
        stride: by system, 1 or STRIDE: it runs in rounds 0, stride, 2 * stride, ... so that any
            two systems share the rounds of the slower.
    """

    rounds: int
    stride: dict[str, int]


def plan_rounds(expected: Seconds, budget: float, least: int = 3, most: int = 25) -> Plan:
    """As many rounds as the budget allows, from `least` to `most`.

    Args:
        expected: seconds of one step of each system.
        budget: seconds for all rounds together.
    """
    middle = statistics.median(expected.values())
    stride = {name: STRIDE if cost > SLOW * middle else 1 for name, cost in expected.items()}
    one_round = sum(cost / stride[name] for name, cost in expected.items())
    rounds = int(budget / max(one_round, 1e-9))
    least -= least * one_round > PATIENCE * budget
    return Plan(rounds=max(least, min(most, rounds)), stride=stride)


def interleaved(
    steps: dict[str, Callable[[], Seconds]],
    plan: Plan,
    on_round: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, list[float | None]]]:
    """Run the rounds.

    Args:
        steps: one step of each system; returns seconds by measure.
        plan: rounds and strides.
        on_round: called after each round with rounds done and all rounds.
    Returns:
        by system and measure, seconds of every round, None where the system was left out.
    """
    found: dict[str, dict[str, list[float | None]]] = {name: {} for name in steps}
    with collector_paused():
        for number in range(plan.rounds):
            for name, step in steps.items():
                if number % plan.stride[name]:
                    for values in found[name].values():
                        values.append(None)
                    continue
                for measure, seconds in step().items():
                    found[name].setdefault(measure, []).append(seconds)
            on_round(number + 1, plan.rounds)
    return found


class collector_paused:
    """No garbage collection inside a timed block."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()


def now(device: torch.device) -> float:
    """Seconds on a clock, after the device has finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
