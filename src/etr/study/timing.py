"""Time of a training step of several rows, interleaved, so that all meet the same machine.

Rows start from their trained weights, and the schedules of capacity run through their whole range
in the measured rounds; nothing is learned on the way. Times are processor seconds of the one thread
that works: what a clock shows where nothing else runs, and nearly the same where something does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from etr.moe import attach, moe_layers
from etr.study.run import Run, load_model
from etr.study.tasks import TASKS, open_task
from etr.train.compare import environment
from etr.train.optimizer import build_optimizer
from etr.train.step import take_step
from etr.train.tasks import backward


def step_times(
    runs: Sequence[Run],
    weights: Path,
    *,
    rounds: int = 48,
    on_round: Callable[[int], None] = lambda number: None,
) -> dict[str, Any]:
    """Median ratio of each row's step time to the first one's in the same round.

    The order within a round alternates, and two rounds go before the first that counts.

    Args:
        runs: finished runs whose weights were kept; the first is the reference.
        weights: folder of their weights.
        rounds: counted rounds, at least 4.
        on_round: called after each.
    Returns:
        ``{"environment", "rounds", "rows": {name: {"ratio", "low", "high", "mean_ratio",
        "seconds"}}}``; low and high are quartiles. `mean_ratio` is the ratio of the mean times,
        which is what a whole schedule costs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steppers = {run.row: _stepper(run, weights, rounds) for run in runs}
        seconds: dict[str, list[float]] = {name: [] for name in steppers}
        for number in range(-2, rounds):
            names = list(steppers) if number % 2 else list(reversed(steppers))
            for name in names:
                began = time.process_time()
                steppers[name](max(number, 0))
                if number >= 0:
                    seconds[name].append(time.process_time() - began)
            on_round(number + 1)
    finally:
        torch.set_num_threads(threads)
    return {
        "environment": {**environment(), "threads": 1},
        "rounds": rounds,
        "reference": runs[0].row,
        "rows": {name: _ratios(own, seconds[runs[0].row]) for name, own in seconds.items()},
    }


def _stepper(run: Run, weights: Path, rounds: int) -> Callable[[int], None]:
    """A function that does one training step at a given round, without learning."""
    config = run.config()
    task = open_task(run.task, TASKS[run.task].config(1))
    model = load_model(run, weights).train()
    optimizer = build_optimizer(model, config.optimizer)
    attach(model, optimizer, None)
    batches, max_norm = task.training_batches(config), config.optimizer.max_grad_norm

    def step(number: int) -> None:
        for layer in moe_layers(model):
            layer.capacity.set_progress(number / max(rounds - 1, 1))
        take_step(optimizer, lambda: backward(task, model, next(batches), max_norm), rate=0.0)

    return step


def _ratios(own: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(own, reference, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "mean_ratio": _trimmed_mean(own) / _trimmed_mean(reference),
        "seconds": statistics.median(own),
    }


def _trimmed_mean(values: Sequence[float]) -> float:
    """Mean without the slowest tenth, which other work on the machine made slow."""
    kept = sorted(values)[: max(1, round(0.9 * len(values)))]
    return statistics.fmean(kept)
