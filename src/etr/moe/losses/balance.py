"""The balance loss: what makes load even."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from etr.moe.losses.base import AuxMode, Loss, LossInput
from etr.moe.losses.means import mean_over_valid
from etr.moe.routing import Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Balance(Loss):
    """Load times probability, summed over experts; see `balance_loss`."""

    name = "balance"
    key = "aux"
    own = 0.01
    needs = ("has_probs", "tokens_choose")
    one_when_even = True

    mode: AuxMode = "ranks"
    """Whose choices count as load; see `LossInput.load`."""

    @property
    def needs_past(self) -> bool:
        return self.mode == "previous"

    @property
    def is_mean(self) -> bool:
        return self.mode == "previous"  # a load that no token of the batch has a part in

    @property
    def counts_ranks(self) -> bool:
        return self.mode != "micro"

    def __call__(self, given: LossInput) -> Tensor:
        return balance_loss(given.routing, given.load(self.mode), given.context.data_group)


def balance_loss(routing: Routing, load: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """``E * sum_e f_e P_e``: 1 when load or probabilities are even, E when all go to one expert.

    arXiv 2101.03961, eq. 4; f may come from more tokens than P (arXiv 2501.11873).

    Args:
        routing: gives P, the mean probability of each expert over valid tokens.
        load: choices per expert that f is the share of, [E]; no gradient.
        group: ranks over whose tokens P's mean is taken; `load` must be global already.
    Returns:
        scalar, not yet scaled by alpha.
    Raises:
        ValueError: the router has no probabilities.
    """
    share, mean = shares(routing, load, group)
    return routing.num_experts * (share * mean).sum()


def shares(
    routing: Routing, load: Tensor, group: ProcessGroup | None, probs: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The share of the load and the mean probability of each expert, f and P of `balance_loss`.

    Args: as `balance_loss`.
        probs: in the place of the routing's, [T, N], for a load of N.
    """
    probs = routing.probs if probs is None else probs
    if probs is None:
        raise ValueError("the balance loss needs probabilities, and this router has none")
    share = load.detach().to(probs.dtype)
    return share / share.sum().clamp_min(1.0), mean_over_valid(probs, routing, group)
