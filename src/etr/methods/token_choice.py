"""Token choice by a learned linear router: Switch and Mixtral (arXiv 2101.03961, 2401.04088)."""

from __future__ import annotations

from etr.methods.card import Card, Row
from etr.moe.routers import ROUTERS, TokenChoice

CARD = Card(
    name="token_choice",
    title="Token choice (Switch, Mixtral)",
    summary=TokenChoice.summary,
    paper="2101.03961, 2401.04088",
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=TokenChoice),),
    options={"router": "token_choice"},
    against="baseline",
    claim=(
        "Logits 1, 2, 0 give the top 1 expert 1 with weight 0.6652, and the top 2 experts 1 and 0 "
        "with weights 0.7311 and 0.2689."
    ),
    departs="Experts can rank their choosers by score too; by position is the default.",
)
