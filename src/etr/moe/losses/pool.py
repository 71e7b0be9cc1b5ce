"""The balance loss of a bank, over all layers that share it (arXiv 2605.06665)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.losses.balance import shares
from etr.moe.losses.base import Loss, LossInput


@dataclass(frozen=True, kw_only=True)
class PoolBalance(Loss):
    """The balance loss of a bank over all layers that share it, with their mean load.

    A layer adds the products of its load and probabilities with those of the layers before it, so
    that the mean over layers is the loss of the pool. In a layer by itself it is the balance loss.
    """

    name = "pool_balance"
    own = 0.01
    needs = ("has_probs", "tokens_choose")
    one_when_even = True

    def __call__(self, given: LossInput) -> Tensor:
        share, mean = shares(given.routing, given.load("ranks"), given.context.data_group)
        found = share @ mean
        pool = given.pool()
        for other_share, other_mean in pool.before(self.label, (share, mean)):
            found = found + share @ other_mean + other_share @ mean
        # Layers that are closed to some experts share the others out among them.
        reached = torch.as_tensor(given.num_open * pool.count).clamp_max(len(share))
        return found * reached / pool.count
