"""The z loss: what keeps logits small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from etr.moe.losses.base import Loss, LossInput
from etr.moe.losses.means import mean_over_valid
from etr.moe.routing import Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Z(Loss):
    """Mean squared log-sum-exp of the logits; see `z_loss`."""

    name = "z"
    own = 1e-3
    needs = ("has_probs",)

    @property
    def is_mean(self) -> bool:
        return True

    def __call__(self, given: LossInput) -> Tensor:
        return z_loss(given.routing, given.context.data_group)


def z_loss(routing: Routing, group: ProcessGroup | None = None) -> Tensor:
    """Mean over valid tokens of ``logsumexp(logits)^2`` (arXiv 2202.08906, eq. 5), unscaled."""
    if routing.logits is None:
        raise ValueError("the z loss needs logits, and this router has none")
    return mean_over_valid(routing.logits.logsumexp(-1).square(), routing, group)
