"""The study: which rows run on which task, and what each is compared with.

`FULL` is what docs/results/quality.md reports; `smoke` passes the whole path in a minute.
"""

from __future__ import annotations

from etr.study.grid import Block
from etr.study.study import Study

REFERENCE = "linear-1.1"
"""Row that all others are compared with: a learned linear router, top-1, capacity factor 1.1."""

SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4)
"""Further seeds of the headline pair."""

LM_STEPS = 400
"""Steps of the language model."""

FACTORS = (1.1, 0.6, 0.4, 0.2)
FRAMES = ("fixed", "learned", "orthonormal")
LEFT_OUT = (("learned", 0.4), ("learned", 0.2))
"""Not run: too little time, and the learned frame's other factors place it."""
LINEAR = "token_choice/rank_by=score"
ETR = "etr=etr"


def factor(value: float) -> str:
    """A constant capacity factor as a part of a variant."""
    return f"capacity=factor:capacity_factor={value}"


def linear(value: float) -> str:
    """The linear router, ranked by score, at a factor."""
    return f"linear-{value}={LINEAR}/{factor(value)}"


def frame(name: str, value: float) -> str:
    """The published ETR router with a frame at a constant factor."""
    return f"{name}-{value}=etr_paper:frame={name}/{factor(value)}"


def upwards(name: str, router: str) -> str:
    """A router under the capacity schedule that `etr` has by default."""
    return f"{name}={router}/capacity=schedule:start_factor=0.4,end_factor=1.1"


CAPACITY_ROWS = (
    *(linear(value) for value in FACTORS),
    *(frame(name, value) for name in FRAMES for value in FACTORS if (name, value) not in LEFT_OUT),
)
"""The linear router and the three frames at four factors, all ranked by score."""

PART_ROWS = (
    "baseline=baseline",
    f"linear-position-0.6=token_choice/rank_by=position/{factor(0.6)}",
    f"tokens-choose-0.6=etr_paper:choice=token/{factor(0.6)}",
    f"experts-choose-0.6=etr_paper:choice=expert/{factor(0.6)}",
    f"linear-schedule={LINEAR}/capacity=schedule",
    "etr_paper=etr_paper",
    *(f"mass-{rho}=etr_paper/capacity=affinity_mass:rho={rho}" for rho in (0.7, 0.9)),
    "threshold-trained=etr_paper/capacity=threshold",
    "locmoe=locmoe",
    f"linear-no-aux-0.6={LINEAR}/aux_alpha=0.0/{factor(0.6)}",
    f"fixed-no-aux-0.6=etr_paper/aux_alpha=0.0/{factor(0.6)}",
    f"linear-top2-0.6={LINEAR}/top_k=2/{factor(0.6)}",
    f"fixed-top2-0.6=etr_paper/top_k=2/{factor(0.6)}",
)
"""What each part of the method gives: one thing differs from a row of `CAPACITY_ROWS`."""

UP = upwards("linear-up", LINEAR)
"""What a learned router reaches with the capacity of `etr`."""

TEACHER_ROWS = (
    linear(1.1),
    linear(0.6),
    linear(0.2),
    frame("fixed", 1.1),
    frame("fixed", 0.6),
    frame("orthonormal", 0.6),
    "etr_paper=etr_paper",
    UP,
    ETR,
)

FULL = Study(
    reference=REFERENCE,
    blocks=(
        Block(name="capacity", task="text-x", variants=CAPACITY_ROWS, steps=1000, seeds=SEEDS),
        Block(name="parts", task="text-x", variants=PART_ROWS, steps=1000, seeds=SEEDS),
        Block(
            name="headline",
            task="text-x",
            variants=(linear(1.1), ETR),
            steps=1000,
            seeds=SEEDS + MORE_SEEDS,
        ),
        Block(name="control", task="text-x", variants=(UP,), steps=1000, seeds=SEEDS),
        Block(
            name="headline, matched",
            task="text-x",
            variants=(ETR,),
            steps=1000,
            seeds=SEEDS + MORE_SEEDS,
            match="expert_flops",
        ),
        Block(
            name="controls, matched",
            task="text-x",
            variants=(linear(0.6), UP, frame("orthonormal", 0.6), "etr_paper=etr_paper"),
            steps=1000,
            seeds=SEEDS,
            match="expert_flops",
        ),
        Block(
            name="headline, timed",
            task="text-x",
            variants=(ETR,),
            steps=1000,
            seeds=SEEDS + MORE_SEEDS,
            match="seconds",
        ),
        Block(
            name="controls, timed",
            task="text-x",
            variants=(UP, "etr_paper=etr_paper"),
            steps=1000,
            seeds=SEEDS,
            match="seconds",
        ),
        Block(name="half easy", task="teacher-50", variants=TEACHER_ROWS, steps=1000, seeds=SEEDS),
        Block(
            name="half easy, matched",
            task="teacher-50",
            variants=(ETR, "etr_paper=etr_paper"),
            steps=1000,
            seeds=SEEDS,
            match="expert_flops",
        ),
        Block(name="most easy", task="teacher-70", variants=TEACHER_ROWS, steps=1000, seeds=SEEDS),
        Block(
            name="most easy, matched",
            task="teacher-70",
            variants=(ETR, "etr_paper=etr_paper"),
            steps=1000,
            seeds=SEEDS,
            match="expert_flops",
        ),
        Block(
            name="language model",
            task="lm",
            variants=(linear(1.1), ETR, UP, "etr_paper=etr_paper", linear(0.2)),
            steps=LM_STEPS,
            seeds=SEEDS,
        ),
        Block(
            name="language model, timed",
            task="lm",
            variants=(ETR,),
            steps=LM_STEPS,
            seeds=SEEDS,
            match="seconds",
        ),
        Block(
            name="language model, matched",
            task="lm",
            variants=(ETR,),
            steps=LM_STEPS,
            seeds=SEEDS,
            match="expert_flops",
        ),
        Block(name="long", task="text-x", variants=(linear(1.1), ETR), steps=4000, seeds=(0,)),
    ),
)
"""What docs/results/quality.md reports: about four hours on two cores."""

SMOKE = Study(
    reference=REFERENCE,
    timing_rounds=4,
    blocks=(
        Block(
            name="capacity",
            task="text-x",
            variants=(linear(1.1), linear(0.2), frame("fixed", 0.6), ETR),
            steps=10,
            seeds=(0, 1),
        ),
        Block(
            name="headline, matched",
            task="text-x",
            variants=(ETR,),
            steps=10,
            seeds=(0, 1),
            match="expert_flops",
        ),
        Block(
            name="headline, timed",
            task="text-x",
            variants=(ETR,),
            steps=10,
            seeds=(0,),
            match="seconds",
        ),
        Block(
            name="half easy",
            task="teacher-50",
            variants=(linear(1.1), ETR),
            steps=10,
            seeds=(0,),
        ),
        Block(name="language model", task="lm", variants=(linear(1.1), ETR), steps=2, seeds=(0,)),
    ),
)
"""The whole path in about a minute: for tests, not for conclusions."""
