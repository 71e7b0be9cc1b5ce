"""Dynamic expert sharing: tokens of a block take experts of a small core (arXiv 2602.00879)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from etr.methods.card import Card, Row
from etr.moe.serving import SERVING
from etr.moe.serving.chosen import Together, best_of


@dataclass(frozen=True, kw_only=True)
class DynamicSharing(Together):
    """The core is a share of the experts: those with the most votes."""

    name = "dynamic_sharing"
    summary = "tokens of a block share a core of a fixed size, which they vote for"

    beta: float = 0.5
    """Share of the experts in the core, at least top_k of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta <= 1:
            raise ValueError(f"beta={self.beta} must lie in (0, 1]")

    def core(self, votes: Tensor, top_k: int) -> Tensor:
        return best_of(votes, max(top_k, math.floor(self.beta * votes.shape[1] + 1e-9)))


CARD = Card(
    name="dynamic_sharing",
    title="Dynamic expert sharing",
    summary=DynamicSharing.summary,
    paper="2602.00879",
    level="model",
    branch="decoding",
    rows=(Row(table=SERVING, kind=DynamicSharing),),
    against="dropless",
    moves=("loss", "load", "bytes"),
    claim=(
        "A block of 32 tokens uses at most max(k, floor(beta E)) of 16 experts, for beta = 1/4, "
        "1/2 and 3/4; beta = 1, or a token alone in its block, is the model's own top k, bit for "
        "bit."
    ),
    departs=(
        "Weights are normalised over a token's experts where the model's own are. In a model of "
        "block diffusion a block is one that a step fills, or that goes into the cache; that "
        "of `make dlm` (32 experts, blocks of 16) used 15.2 experts a block at beta = "
        "1/2, in the place of 21.0, for 0.004 nats a token of its bound. Without "
        "labels it is so many consecutive tokens of a call; in a model that writes token by token "
        "that is a prompt, or the requests that are decoded side by side."
    ),
)
