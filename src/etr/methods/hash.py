"""Hash layers: the token id alone decides (arXiv 2106.04426)."""

from __future__ import annotations

from etr.methods.card import Card, Row
from etr.moe.routers import ROUTERS, Hash

CARD = Card(
    name="hash",
    title="Hash layer",
    summary=Hash.summary,
    paper="2106.04426",
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=Hash),),
    options={"router": "hash"},
    moves=("loss", "load"),
    claim=(
        "Equal token ids take equal experts whatever the tokens hold, k = 2 different ones with "
        "weight 1/2; the ids 0 to 65,535 load 8 experts evenly within 2 %."
    ),
    departs="A random hash, the paper's first variant; not its balanced or clustered tables.",
)
