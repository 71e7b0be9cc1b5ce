"""UniPool: one pool of experts for all layers, balanced as a whole (arXiv 2605.06665)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etr.methods.card import Card, Row
from etr.moe.context import RouterInput
from etr.moe.experts import BANKS, Shared
from etr.moe.losses import LOSSES, PoolBalance
from etr.moe.routers import ROUTERS, Router, RouterConfig, RouterTraits
from etr.moe.routers.linear import LinearRouter
from etr.moe.routing import Scores
from etr.moe.score_scale import CosineScale


@dataclass(frozen=True, kw_only=True)
class NormRouter(RouterConfig):
    """Token choice by the positive part of logits of length 1, which a learned scale multiplies."""

    name = "norm_router"
    paper = "2605.06665"
    summary = "learned linear router, logits of length 1 through a ReLU, top-k per token"

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(normalize="none", default_capacity="none", gates_are_probs=False)

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _NormRouter(self, hidden_size, num_experts, top_k)


class _NormRouter(LinearRouter):
    """``scale`` [1] starts where the weights of a token of random logits sum to 1."""

    made_of_logits = True

    def __init__(
        self, config: RouterConfig, hidden_size: int, num_experts: int, top_k: int
    ) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.score_scale = CosineScale(num_experts)
        self.scale = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        seeded = torch.Generator().manual_seed(0)
        draws = torch.randn(4096, self.num_experts, generator=seeded, device="cpu")
        best = F.normalize(draws, dim=-1).relu().topk(self.top_k, dim=-1).values
        with torch.no_grad():
            self.scale.copy_(1 / best.sum(-1).mean())

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        return self.of_logits(self.logits(x))

    def of_logits(self, logits: Tensor) -> Scores:
        scores = F.normalize(logits, dim=-1)
        found = scores.relu()
        total = found.sum(-1, keepdim=True)
        probs = (found / total.clamp_min(1e-12)).where(total > 0, 1 / self.num_experts)
        # Ranked before the ReLU, so that experts of weight 0 are not ties.
        gates = found * self.scale.to(logits.dtype)
        return Scores(scores=scores, logits=logits, gates=gates, probs=probs)


CARD = Card(
    name="unipool",
    title="UniPool",
    summary="all layers choose among one pool of experts, whose load is balanced as a whole",
    paper=NormRouter.paper,
    level="model",
    branch="expert design",
    rows=(
        Row(table=LOSSES, kind=PoolBalance),
        Row(table=ROUTERS, kind=NormRouter),
        Row(table=BANKS, kind=Shared),
    ),
    options={"router": "norm_router", "experts": "shared", "losses": "pool_balance"},
    against="token_choice/capacity=none",
    moves=("loss", "load", "memory"),
    claim=(
        "Four layers that each use an expert of their own have a pool loss of 1, where the loss of "
        "each is 4; on it alone, the MaxVio of a pool of 16 falls from over 2 to 0.1 or less while "
        "the layers' own stays at 1 or more."
    ),
    departs=(
        "The whole pool alone: experts are not given to layers for good later in training. The "
        "router's scale starts where the weights of random logits sum to 1."
    ),
)
