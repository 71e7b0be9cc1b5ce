"""Equal wall time on a cluster: what docs/results/time-to-loss.md reports, and a short one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etr.cluster.study.plan import Condition, EqualTimeStudy
from etr.recipes.study import ETR, MORE_SEEDS, REFERENCE, SEEDS, UP, factor, linear
from etr.study.grid import Block

STEPS = {"text-x-own": 1000, "text-x": 1000, "lm": 400}
"""Steps of the reference, by task."""
PADDED = ("padded-1.1", "locmoe")


def local(row: str, weight: float, nodes: int) -> str:
    """A row with the locality loss of a weight, on so many nodes."""
    name, _, rest = row.partition("=")
    suffix = "" if nodes == 2 else f"-on-{nodes}"
    losses = f"losses=balance,locality:weight={weight},nodes={nodes}"
    return f"{name}-local-{weight:g}{suffix}={rest}/{losses}"


LOCMOE = "locmoe=locmoe/losses=balance,locality:nodes=2"
ETR_06 = f"etr-0.6=etr/{factor(0.6)}"
HEADLINE = (linear(0.6), ETR)
"""Rows that, with the reference, have the further seeds too."""
FEW = ("padded-1.1=baseline", linear(0.6), UP, ETR, ETR_06, "etr_paper=etr_paper")
MANY = (
    *FEW,
    LOCMOE,
    f"etr-0.4=etr/{factor(0.4)}",
    "etr-0.2-0.8=etr/capacity=schedule:start_factor=0.2,end_factor=0.8",
)
LOCAL = tuple(local(row, mu, 2) for row in (linear(0.6), ETR_06) for mu in (0.03, 0.1, 0.3))
LOCAL_ON_4 = tuple(local(row, 0.1, 4) for row in (linear(0.6), ETR_06))

_WHERE = {"text-x-own": "own text", "text-x": "mixed text", "lm": "language model, mixed text"}
CELLS: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    ("text-x-own", "2x2", 1.0, MANY + LOCAL),
    ("text-x-own", "2x2", 0.25, MANY + LOCAL),
    ("text-x-own", "4x1", 1.0, FEW + LOCAL_ON_4),
    ("text-x", "2x2", 1.0, FEW),
    ("text-x", "2x2", 0.25, FEW),
    ("lm", "2x2", 1.0, FEW),
)
"""Task, shape, ratio of compute to network, rows."""


def equal_time(
    cells: Sequence[tuple[str, str, float, tuple[str, ...]]] = CELLS,
    steps: dict[str, int] = STEPS,
    seeds: Sequence[int] = SEEDS,
    more_seeds: Sequence[int] = MORE_SEEDS,
    **sizes: int,
) -> EqualTimeStudy:
    """The study: equal steps on every task, then equal time on every cluster.

    Args:
        cells: clusters and their rows.
        steps: of the reference, by task.
        seeds: of every row.
        more_seeds: of the headline's rows and the reference, beside these, on the first cell.
        sizes: fields of the study that say how steps are timed.
    """
    blocks, conditions = list[Block](), dict[str, Condition]()
    for task in dict.fromkeys(cell[0] for cell in cells):
        asked = dict.fromkeys(row for of, _, _, rows in cells if of == task for row in rows)
        every = (linear(1.1), linear(0.2), *asked)
        same: dict[str, Any] = {"task": task, "steps": steps[task], "diagnostics": False}
        equal, both = f"{_WHERE[task]}, equal steps", (*seeds, *more_seeds)
        blocks.append(Block(name=equal, variants=every, seeds=tuple(seeds), **same))
        headline = tuple(row for row in cells[0][3] if row in HEADLINE)
        if task == cells[0][0] and more_seeds:
            variants = (linear(1.1), *headline)
            blocks.append(Block(name=f"{equal}, headline", variants=variants, seeds=both, **same))
        for cell in cells:
            if cell[0] != task:
                continue
            name = f"{_WHERE[task]}, {cell[1]}, compute over network {cell[2]:g}"
            conditions[name] = Condition(shape=cell[1], compute_ratio=cell[2])
            timed = {**same, "match": "seconds"}
            blocks.append(Block(name=name, variants=cell[3], seeds=tuple(seeds), **timed))
            if cell is cells[0] and more_seeds:
                conditions[f"{name}, headline"] = conditions[name]
                name = f"{name}, headline"
                blocks.append(Block(name=name, variants=headline, seeds=both, **timed))
    return EqualTimeStudy(
        blocks=tuple(blocks),
        reference=REFERENCE,
        conditions=conditions,
        padded=PADDED,
        **sizes,  # type: ignore[arg-type]
    )


def smoke() -> EqualTimeStudy:
    """The whole path on three rows and a few steps: for tests, not for conclusions."""
    rows = (linear(0.6), "padded-1.1=baseline", local(linear(0.6), 0.1, 2))
    return equal_time(
        (("text-x-own", "2x2", 0.25, rows),),
        {"text-x-own": 10},
        (0,),
        (),
        points=2,
        sequences_per_rank=2,
        rounds=1,
    )


__all__ = ["equal_time", "smoke"]
