"""Load balance without a loss: a selection bias that moves once a step (arXiv 2408.15664).

What moves it is `bias_update` of `TokenChoice`, in three forms (arXiv 2512.03915).
"""

from __future__ import annotations

from etr.methods.card import Card, Row
from etr.moe.routers import ROUTERS, TokenChoice

CARD = Card(
    name="loss_free_balance",
    title="Auxiliary-loss-free load balancing",
    summary="sigmoid gates, and a selection bias that moves against the load; no balance loss",
    paper="2408.15664, 2512.03915",
    level="model",
    branch="training",
    rows=(Row(table=ROUTERS, kind=TokenChoice),),
    options={"router": "token_choice:gate=sigmoid,bias_update=sign", "aux_alpha": "0"},
    moves=("loss", "load"),
    claim=(
        "Where one of 8 experts is the favourite of all tokens, the bias alone brings MaxVio from "
        "over 2 to under 0.25, in each of its three forms, and combine weights are those of the "
        "scores without it."
    ),
    departs=(
        "The capacity is the router's own here; the paper drops no token. The published step is by "
        "sign; bias_update=proportional and decaying are those of its theory."
    ),
)
