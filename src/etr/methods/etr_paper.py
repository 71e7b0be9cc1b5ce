"""Expert-Token Resonance as published (arXiv 2406.00023)."""

from __future__ import annotations

from etr.methods.card import Card, Row
from etr.moe.routers import ROUTERS, EtrPaper

CARD = Card(
    name="etr_paper",
    title="Expert-Token Resonance as published",
    summary="fixed block vectors, ranking by cosine, a capacity that falls",
    paper="2406.00023",
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=EtrPaper),),
    options={"router": "etr_paper"},
    against="baseline",
    moves=("loss", "load", "drops", "FLOPs"),
    claim=(
        "A token that is an expert's block vector has affinity 1 with that expert and 0 with the "
        "others; of an expert's choosers the C of greatest cosine stay; C falls from 1.1 to 0.6 of "
        "the mean load."
    ),
    departs="Where the paper is open or cannot hold, docs/method.md says what was decided.",
)
