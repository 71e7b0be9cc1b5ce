"""Chain-of-Experts: a token passes the experts several times, routed anew (arXiv 2506.18945)."""

from __future__ import annotations

from etr.methods.card import Card, Row
from etr.moe.routers import ROUTERS, TokenChoice

CARD = Card(
    name="chain_of_experts",
    title="Chain-of-Experts",
    summary="the same experts in two inner steps, each with a router that sees what was added",
    paper="2506.18945",
    level="model",
    branch="expert design",
    rows=(Row(table=ROUTERS, kind=TokenChoice),),
    options={
        "router": "token_choice",
        "inner_steps": "2",
        "top_k": "2",
        "capacity": "none",
    },
    against="token_choice/top_k=4/capacity=none",
    moves=("loss", "load"),
    claim=(
        "With 1 step it is the plain layer bit for bit; 2 steps have the same expert parameters, "
        "and at half the experts a step the same operations, and each router has a gradient."
    ),
    departs=(
        "The layer gives what its steps add, and the block adds the token itself, once; in the "
        "released code the norm comes before the loop, and the block's sum is another. Losses are "
        "means over steps. No gain of the loss was seen at this size."
    ),
)
