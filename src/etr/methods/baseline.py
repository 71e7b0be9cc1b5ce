"""What Expert-Token Resonance is measured against (arXiv 2101.03961)."""

from __future__ import annotations

from etr.methods.card import Card, Row
from etr.moe.routers import ROUTERS, Baseline

CARD = Card(
    name="baseline",
    title="Padded linear top-1",
    summary="linear softmax top-1, factor 1.1, dropped by position, padded",
    paper="2101.03961",
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=Baseline),),
    options={"router": "baseline"},
    claim=(
        "Of 16 tokens that all choose one of 4 experts the first 5 stay, ceil(1.1 * 16 / 4), and "
        "the others get output 0."
    ),
)
