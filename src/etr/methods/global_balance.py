"""Global-batch load balance: the load of all ranks and micro-batches (arXiv 2501.11873)."""

from __future__ import annotations

from etr.methods.card import Card, Row
from etr.moe.losses import LOSSES, Balance
from etr.moe.routers import ROUTERS, TokenChoice

CARD = Card(
    name="global_balance",
    title="Global-batch load balance",
    summary="a balance loss whose load is that of all ranks and of the step's micro-batches so far",
    paper="2501.11873",
    level="model",
    branch="training",
    rows=(Row(table=LOSSES, kind=Balance), Row(table=ROUTERS, kind=TokenChoice)),
    options={"router": "token_choice", "losses": "balance:mode=running"},
    moves=("loss", "load"),
    claim=(
        "Four micro-batches of one domain each, every one with an expert of its own (E = 4), have "
        "loss 4 each by themselves, and 4, 2, 4/3 and 1 in order; 2 ranks have the value and the "
        "gradient of 1 rank that holds all tokens."
    ),
    departs=(
        "Micro-batches count those before them, as published, so that their order matters; "
        "mode=previous takes the last step's load, in which neither order nor number does."
    ),
)
