"""The search for the form of ETR that is served as it is trained; docs/results/winner-plan.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from etr.recipes.study import ETR, LINEAR, REFERENCE, UP, factor, linear
from etr.study.grid import Block
from etr.study.study import Study

SEARCH_STEPS = 600
STEPS = {"text-x": 1000, "teacher-50": 600, "lm": 200}
"""Steps of `linear-1.1` at the verdict, by task; other rows take as many as cost as much."""
SEARCH_SEEDS, SEEDS = (90, 91), (10, 11, 12, 13, 14)
"""Of the search, and of the verdict; no run had these before."""

MAP = "experts=stand_in:rank=16"
VECTOR = "experts=stand_in:rank=0"
THRESHOLD = "capacity=threshold:factor,target.capacity_factor"


def rising(low: float, high: float) -> str:
    """A capacity that rises over training, as a part of a variant."""
    return f"capacity=schedule:start_factor={low},end_factor={high}"


BESIDE = (linear(0.6), ETR)
"""Rows that the winner must beat."""
REFERENCES = (linear(1.1), *BESIDE, UP)
FORMS = (
    f"etr-0.6=etr/{factor(0.6)}",
    f"etr-0.6-vector=etr/{factor(0.6)}/{VECTOR}",
    f"etr-0.6-map=etr/{factor(0.6)}/{MAP}",
    f"etr-0.4-map=etr/{factor(0.4)}/{MAP}",
    f"linear-0.6-map={LINEAR}/{factor(0.6)}/{MAP}",
    f"etr-0.3-0.6-map=etr/{rising(0.3, 0.6)}/{MAP}",
    f"etr-threshold-0.6=etr/{THRESHOLD}=0.6",
    f"etr-threshold-0.6-map=etr/{THRESHOLD}=0.6/{MAP}",
    f"linear-threshold-0.6-map={LINEAR}/{THRESHOLD}=0.6/{MAP}",
    f"fixed-0.6-map=etr:frame=fixed/{factor(0.6)}/{MAP}",
    f"etr-top2-0.3-map=etr/top_k=2/normalize=none/{factor(0.3)}/{MAP}",
    f"etr-0.6-coupled=etr/{factor(0.6)}/losses=balance,router_coupling",
)
"""What is searched, each one step from another."""
LAST: tuple[str, ...] = ()
"""The forms of `FORMS` that the search leaves, by the rule of the plan; written after it."""


def winner(
    steps: Mapping[str, int] = STEPS,
    search_steps: int = SEARCH_STEPS,
    search_seeds: Sequence[int] = SEARCH_SEEDS,
    seeds: Sequence[int] = SEEDS,
    forms: Sequence[str] = FORMS,
    last: Sequence[str] = LAST,
) -> Study:
    """The search on `text-x`, and the verdict on every task among what it leaves.

    Args:
        steps: of `linear-1.1` at the verdict, by task.
        search_steps: the same of the search.
        search_seeds, seeds: of the search, and of the verdict.
        forms: rows of the search.
        last: rows of the verdict; none before the search has been seen.
    """
    rows: dict[str, Any] = {"task": "text-x", "steps": search_steps, "seeds": tuple(search_seeds)}
    rest = (*REFERENCES[1:], *forms)
    blocks = [
        Block(name="search", variants=(REFERENCES[0], *rest), **rows),
        Block(name="search, matched", variants=rest, match="expert_flops", **rows),
    ]
    for task, count in steps.items() if last else ():
        same: dict[str, Any] = {"task": task, "steps": count}
        ends, every = (*BESIDE, *last), tuple(seeds)
        costs = (REFERENCES[0], *ends)
        blocks += [
            Block(name=f"{task}, costs", variants=costs, seeds=every[:1], **same),
            Block(name=f"{task}, reference", variants=REFERENCES[:1], seeds=every, **same),
            Block(name=task, variants=ends, seeds=every, match="expert_flops", **same),
        ]
    return Study(blocks=tuple(blocks), reference=REFERENCE)


def smoke() -> Study:
    """The whole path on one form and a few steps: for tests, not for conclusions."""
    form = (FORMS[2],)
    return winner({"text-x": 10}, 10, (90, 91), (10, 11), form, form)


__all__ = ["BESIDE", "FORMS", "LAST", "smoke", "winner"]
