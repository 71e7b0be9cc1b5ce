"""AdaMoE: null experts among a larger number of choices (arXiv 2406.13233)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.moe.experts import BANKS, Nulls
from etr.moe.losses import LOSSES, Loss, LossInput, balance_loss
from etr.moe.routers import ROUTERS, TokenChoice


@dataclass(frozen=True, kw_only=True)
class NullBalance(Loss):
    """The balance loss, in which null experts share their load: which of them is chosen is free."""

    name = "null_balance"
    key = "aux"
    own = 0.01
    needs = ("has_probs", "tokens_choose")
    one_when_even = True

    def __call__(self, given: LossInput) -> Tensor:
        load = given.load("ranks").to(given.routing.gate.dtype)
        free = given.free
        load = torch.where(free, (load * free).sum() / free.sum().clamp_min(1), load)
        return balance_loss(given.routing, load, given.context.data_group)


CARD = Card(
    name="adamoe",
    title="AdaMoE",
    summary="null experts that cost nothing, a larger top_k, and a loss that balances their sum",
    paper="2406.13233",
    level="model",
    branch="dynamic routing",
    rows=(
        Row(table=LOSSES, kind=NullBalance),
        Row(table=BANKS, kind=Nulls),
        Row(table=ROUTERS, kind=TokenChoice),
    ),
    options={
        "router": "token_choice",
        "top_k": "4",
        "experts": "nulls:count=8",
        "capacity": "none",
        "losses": "null_balance",
    },
    against="token_choice/top_k=2/capacity=none",
    moves=("loss", "load", "experts per token", "FLOPs"),
    claim=(
        "Balanced routing among 8 experts and 8 nulls at k = 4 gives a token 2.0 true experts on "
        "average, and other tokens other numbers; without nulls it is top-k exactly."
    ),
    departs="The paper starts from a trained model with LoRA; here it trains from the start.",
)
