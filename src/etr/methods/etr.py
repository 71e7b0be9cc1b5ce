"""Expert-Token Resonance as this library has it (arXiv 2406.00023)."""

from __future__ import annotations

from etr.methods.card import Card, Row
from etr.moe.capacity import CAPACITIES, Schedule
from etr.moe.routers import ROUTERS, EtrRouter

CARD = Card(
    name="etr",
    title="Expert-Token Resonance",
    summary=EtrRouter.summary,
    paper="2406.00023",
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=EtrRouter), Row(table=CAPACITIES, kind=Schedule)),
    options={"router": "etr"},
    against="baseline",
    moves=("loss", "load", "drops", "FLOPs"),
    claim=(
        "Expert directions stay orthonormal within 1e-5 in training; of an expert's choosers the C "
        "of greatest gate stay, in whatever order the tokens come; C rises from 0.4 to 1.1 of the "
        "mean load."
    ),
    departs=(
        "Dense orthonormal directions, a learned temperature, ranking by gate and a capacity that "
        "rises, where measurements say so: docs/results/quality.md."
    ),
)
