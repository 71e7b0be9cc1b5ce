"""Experts that every token passes, beside the routed ones."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from etr.moe.experts.backends import EXPERT_BACKENDS
from etr.moe.experts.weights import ExpertParams, ExpertWeights


class SharedGate(nn.Linear):
    """A linear layer that computes in the dtype of its input, [..., H] to [..., 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def run_shared(x: Tensor, experts: ExpertWeights, gate: nn.Module | None, counts: Tensor) -> Tensor:
    """What every token gets, [T, H].

    Args:
        x: tokens, float [T, H].
        experts: side by side, as one expert of their summed width.
        gate: a logit of each token, [T, 1], whose sigmoid weighs what it gets; None for 1.
        counts: of any experts, int64 [E]; a padded backend reads none.
    """

    def run(x: Tensor, params: ExpertParams) -> Tensor:
        return EXPERT_BACKENDS["bmm"].run(x[None], counts, params)[0]

    y: Tensor = experts(x, x.dtype, run)
    return y if gate is None else y * gate(x).sigmoid()
