"""LocMoE, the predecessor of Expert-Token Resonance (arXiv 2401.13920)."""

from __future__ import annotations

from etr.methods.card import Card, Row
from etr.moe.capacity import CAPACITIES, LocMoE
from etr.moe.routers import ROUTERS, LocMoERouter

CARD = Card(
    name="locmoe",
    title="LocMoE",
    summary="fixed GrAP top-1, dropped by position, frozen capacity, locality loss",
    paper="2401.13920",
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=LocMoERouter), Row(table=CAPACITIES, kind=LocMoE)),
    options={"router": "locmoe"},
    against="baseline",
    moves=("loss", "load", "drops", "bytes"),
    claim=(
        "The first optimizer step freezes the capacity: where affinities are 0 the bound is 1 / E "
        "tokens and the capacity 1.0 of the mean load, where they are large it is 1.1, and no "
        "later token moves it."
    ),
    departs="The bound explodes as affinities grow, so the factor is clamped to [1.0, 1.1].",
)
