"""X-MoE: cosines of few dimensions between tokens and experts (arXiv 2204.09179)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from etr.methods.card import Card, Row
from etr.moe.affinity import cosine_affinity
from etr.moe.context import RouterInput
from etr.moe.routers import ROUTERS, Router, RouterConfig, RouterTraits
from etr.moe.routing import Scores
from etr.moe.score_scale import CosineScale

TEMPERATURES = {"softmax": 0.3, "sigmoid": 0.07}
"""What cosines are divided by, at first and in the balance loss."""


@dataclass(frozen=True, kw_only=True)
class XMoE(RouterConfig):
    """Token choice by the cosine of a projected token and an expert's embedding.

    The projection has half as many dimensions as there are experts, so that what routing does to
    tokens is of low rank. The gates' temperature is learned; that of the balance loss is fixed.
    """

    name = "x_moe"
    paper = "2204.09179"
    summary = "cosine of a low-dimensional projection to learned expert embeddings"

    gate: Literal["softmax", "sigmoid"] = "softmax"
    """Cosines over the temperature to combine weights: softmax over experts, or a sigmoid each."""
    dimensions: int | None = None
    """Of the projection; None for half the number of experts."""
    temperature: float | None = None
    """What cosines are divided by: the learned one's start, and the balance loss's. None: 0.3 for
    softmax, 0.07 for sigmoid."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dimensions is not None and self.dimensions < 1:
            raise ValueError(f"dimensions={self.dimensions} must be at least 1, or None")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be > 0, or None")

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            has_cosine=True,
            gates_are_probs=False,  # another temperature
            rank_by=("position",),
            default_capacity="none",
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        return _XMoERouter(self, hidden_size, num_experts, top_k)


class _XMoERouter(Router):
    config: XMoE

    def __init__(self, config: XMoE, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        width = max(1, num_experts // 2) if config.dimensions is None else config.dimensions
        self.score_scale = CosineScale(width)
        self.fixed = config.temperature or TEMPERATURES[config.gate]
        self.weight = nn.Parameter(torch.empty(width, hidden_size))
        self.embedding = nn.Parameter(torch.empty(num_experts, width))
        self.log_temperature = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.hidden_size**-0.5)
        nn.init.normal_(self.embedding, std=0.32 * self.num_experts**-0.5)
        nn.init.constant_(self.log_temperature, math.log(self.fixed))

    def affinity(self, x: Tensor) -> Tensor:
        """Cosine of each token, projected, and each expert, [T, E]."""
        return cosine_affinity(x @ self.weight.to(x.dtype).T, self.embedding.to(x.dtype))

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        cosine = self.affinity(x)
        logits = cosine / self.log_temperature.to(x.dtype).exp()
        gates = logits.softmax(-1) if self.config.gate == "softmax" else logits.sigmoid()
        probs = (cosine / self.fixed).softmax(-1)
        return Scores(scores=cosine, logits=logits, gates=gates, probs=probs)


CARD = Card(
    name="x_moe",
    title="X-MoE",
    summary=XMoE.summary,
    paper=XMoE.paper,
    level="model",
    branch="dynamic routing",
    rows=(Row(table=ROUTERS, kind=XMoE),),
    options={"router": "x_moe"},
    against="token_choice/capacity=none",
    moves=("loss", "load"),
    claim=(
        "A token and 7 times that token, and an expert's embedding and 5 times that, have the same "
        "cosines within 1e-6; the gradient that routing sends into tokens has rank <= E / 2, where "
        "a linear router's has E - 1."
    ),
    departs=(
        "The text of the paper, from which the published code differs: tokens are normalised and "
        "the temperature is learned, as its logarithm; it starts at that of the balance loss."
    ),
)
