"""Expert choice: experts take their best tokens of the batch (arXiv 2202.09368)."""

from __future__ import annotations

from etr.methods.card import Card, Row
from etr.moe.routers import ROUTERS, ExpertChoice

CARD = Card(
    name="expert_choice",
    title="Expert choice",
    summary=ExpertChoice.summary,
    paper="2202.09368",
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=ExpertChoice),),
    options={"router": "expert_choice"},
    moves=("loss", "load", "experts per token"),
    claim=(
        "At capacity factor 1 each of 4 experts takes the 16 of 64 tokens to which it gives the "
        "greatest probability (MaxVio = 0), and a later token can take an earlier one's place."
    ),
    departs="Served by thresholds learned in training, which look at no other token.",
)
