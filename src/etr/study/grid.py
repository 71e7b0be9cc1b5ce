"""Blocks of rows, and how many steps a row gets so that it costs what the reference costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from etr.study.run import Run
from etr.train import parse_variant

Match = Literal["steps", "expert_flops", "seconds"]
MATCHES: dict[Match, str] = {
    "steps": "equal steps",
    "expert_flops": "equal expert FLOPs",
    "seconds": "equal time",
}
ROUND_TO = 10
"""Matched steps are rounded to a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows that are run on one task with the same seeds."""

    name: str
    """Unique in a study."""
    task: str
    """Name in TASKS."""
    variants: tuple[str, ...]
    """Rows; those to match were run with `steps` steps in an earlier block."""
    steps: int
    """Optimizer steps (of the reference)."""
    seeds: tuple[int, ...]
    """Every row runs once with each."""
    match: Match = "steps"
    """What rows have in common with the reference: the number of steps, or, by the measurements
    of the earlier block, what the experts or the clock took."""
    diagnostics: bool = True
    """Whether to measure what the trained experts are like too."""

    @property
    def rows(self) -> list[str]:
        """Names of the rows."""
        return [parse_variant(text).name for text in self.variants]


def runs_of(block: Block, cost: Callable[[str, Match], float]) -> list[Run]:
    """The runs of a block, seed after seed.

    Args:
        cost: cost of a row's step over that of the reference's, by row and kind of match.
    """
    steps = {}
    for text in block.variants:
        share = 1.0 if block.match == "steps" else cost(text, block.match)
        steps[text] = max(ROUND_TO, round(block.steps / share / ROUND_TO) * ROUND_TO)
        if block.match == "steps":
            steps[text] = block.steps
    return [
        Run(task=block.task, variant=text, steps=steps[text], seed=seed)
        for seed in block.seeds
        for text in block.variants
    ]


def flops_ratio(row: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]]) -> float:
    """Expert FLOPs of a row's step over the reference's, means over all seeds of both."""

    def per_step(results: Sequence[dict[str, Any]]) -> float:
        return statistics.fmean(result["expert_flops"] / result["steps"] for result in results)

    return per_step(row) / per_step(reference)
