"""Learned linear scores: what many routers have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etr.moe.context import RouterInput
from etr.moe.routers.base import Router, RouterConfig
from etr.moe.routing import Scores
from etr.moe.score_scale import OddsScale


class LinearRouter(Router):
    """A router with logits ``x W^T``; ``weight`` is [E, H].

    Args: as `Router`.
    """

    def __init__(
        self, config: RouterConfig, hidden_size: int, num_experts: int, top_k: int
    ) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        LinearRouter.reset_parameters(self)  # what a subclass adds is not there yet

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.hidden_size**-0.5)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [T, E] of tokens [T, H]."""
        return x @ self.weight.to(x.dtype).T


class SoftmaxRouter(LinearRouter):
    """Scores ``softmax(x W^T)``, which rank and weigh alike.

    Who makes more of the logits than that says that it is not `made_of_logits`.

    Args: as `Router`.
    """

    made_of_logits = True

    def __init__(
        self, config: RouterConfig, hidden_size: int, num_experts: int, top_k: int
    ) -> None:
        super().__init__(config, hidden_size, num_experts, top_k)
        self.score_scale = OddsScale(1 / num_experts)

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        return self.of_logits(self.logits(x))

    def of_logits(self, logits: Tensor) -> Scores:
        probs = logits.softmax(-1)
        return Scores(scores=probs, logits=logits, gates=probs, probs=probs)
