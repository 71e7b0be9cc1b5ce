"""dMoE: tokens of a block choose among the experts that hold a share of its votes (2605.30876)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.methods.card import Card, Row
from etr.moe.serving import SERVING
from etr.moe.serving.chosen import Together, best_of


@dataclass(frozen=True, kw_only=True)
class DMoE(Together):
    """The core is the smallest set of experts that holds a share of the votes."""

    name = "dmoe"
    summary = "tokens of a block share the experts that hold a share of their votes"

    tau: float = 0.7
    """Share of the votes to reach; 1 and more: all experts."""
    least: int | None = None
    """Experts that the core holds at least; None for top_k."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0:
            raise ValueError(f"tau={self.tau} must be > 0")
        if self.least is not None and self.least < 1:
            raise ValueError(f"least={self.least} must be at least 1 expert, or None")

    def core(self, votes: Tensor, top_k: int) -> Tensor:
        least = max(top_k, 0 if self.least is None else self.least)
        tau = math.inf if self.tau >= 1 else self.tau
        share = votes / votes.sum(1, keepdim=True).clamp_min(1e-300)  # a block of padding: none
        before = F.pad(share.sort(dim=-1, descending=True).values.cumsum(-1)[:, :-1], (1, 0))
        number = (before < tau - 1e-6).sum(-1, keepdim=True)
        return best_of(votes, torch.clamp(number, min=least))


CARD = Card(
    name="dmoe",
    title="dMoE",
    summary=DMoE.summary,
    paper="2605.30876",
    level="model",
    branch="decoding",
    rows=(Row(table=SERVING, kind=DMoE),),
    against="dropless",
    moves=("loss", "load", "bytes"),
    claim=(
        "A block's experts hold tau = 0.5, 0.7 or 0.9 of its votes and no smaller set does; "
        "tau = 1, or a token alone in its block, is the model's own top k, bit for bit."
    ),
    departs=(
        "The votes must reach tau; the released code keeps one expert more where they meet it. The "
        "core holds top_k experts at least, not 16. Votes are what tokens choose by, a bias "
        "included, where that is positive. In a model of block diffusion a block is one that a "
        "step fills, or that goes into the cache; one that writes token by token is served by it "
        "in prompts, and in requests side by side. The model of `make dlm` (32 experts, "
        "blocks of 16) used 7.0 experts a block at tau = 0.7 and 11.7 at 0.9, in the place of "
        "21.0, for 0.096 and 0.013 nats a token of its bound. At most half of the experts "
        "of a block for at most 0.01 of loss was looked for; in one model that reads text in "
        "order, 0.37 of them cost 0.305 (tau = 0.7, blocks of 32)."
    ),
)
