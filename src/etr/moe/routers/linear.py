"""Learned linear scores through a softmax: what many routers have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etr.moe.context import RouterInput
from etr.moe.routers.base import Router, RouterConfig
from etr.moe.routing import Scores
from etr.moe.score_scale import OddsScale


class SoftmaxRouter(Router):
    """Scores ``softmax(x W^T)``, which rank and weigh alike; ``weight`` is [E, H].

    Args: as `Router`.
    """

    def __init__(
        self, config: RouterConfig, hidden_size: int, num_experts: int, top_k: int
    ) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.score_scale = OddsScale(1 / num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.hidden_size**-0.5)

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        logits = x @ self.weight.to(x.dtype).T
        probs = logits.softmax(-1)
        return Scores(scores=probs, logits=logits, gates=probs, probs=probs)
