"""One optimizer step, as every loop takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def take_step(
    optimizer: torch.optim.Optimizer, backward: Callable[[], T], rate: float | None = None
) -> T:
    """Drop old gradients, make new ones, update the weights.

    The gradients stay until the next step. An error in `backward` leaves the weights as they were.

    Args:
        optimizer: of the weights.
        backward: makes the gradients, over ranks and clipped where that is wanted.
        rate: learning rate of this step; by default the optimizer's own.
    Returns:
        What `backward` returned.
    """
    if rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    found = backward()
    optimizer.step()
    return found
