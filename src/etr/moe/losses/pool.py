"""The balance loss of a bank, over all layers that share it (arXiv 2605.06665)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from etr.moe.losses.base import Loss, LossInput
from etr.moe.losses.means import mean_over_valid


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
        probs = given.routing.probs
        assert probs is not None
        load = given.load("ranks").to(probs.dtype)
        share = load / load.sum().clamp_min(1.0)
        mean = mean_over_valid(probs, given.routing, given.context.data_group)
        found = share @ mean
        pool = given.pool()
        for earlier_share, earlier_mean in pool.before(self.label, (share, mean)):
            found = found + share @ earlier_mean + earlier_share @ mean
        # Layers that are closed to some experts share the others out among them.
        reached = torch.as_tensor(given.num_open * pool.count).clamp_max(len(share))
        return found * reached / pool.count
