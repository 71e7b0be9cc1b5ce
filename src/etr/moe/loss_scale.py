"""What multiplies the main loss on its way into the backward pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class LossScale:
    """Scale of losses that join the backward pass beside the main loss, unseen by its owner.

    A backward pass sees gradients alone, so whoever scales the main loss after the forward says so
    here: `attach` for a GradScaler and for micro-batches, trainers for steps of uneven length.

    Args:
        scaler: with a method `scale`, such as torch.amp.GradScaler; None if it is not known.
        share: weight of one micro-batch in its optimizer step.
    """

    def __init__(self, scaler: Any = None, share: float = 1.0) -> None:
        self.scaler, self.share = scaler, share

    def __call__(self, loss: Tensor) -> Tensor:
        """`loss` as the main loss is scaled now. No synchronisation."""
        if self.share != 1.0:
            loss = loss * self.share
        return loss if self.scaler is None else self.scaler.scale(loss)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # It belongs to one training; a copied or saved layer takes no part in that.
        return type(None), ()


class Attached:
    """Whoever tells layers of optimizer steps, and knows how the main loss is scaled."""

    loss_scale: LossScale
