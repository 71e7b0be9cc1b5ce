"""Which masked places of a block become tokens in a step, and the loop that fills a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from etr.moe.checked import check_types
from etr.table import Table


@dataclass(frozen=True, kw_only=True)
class Unmasking:
    """Base of the policies; one row of `UNMASKINGS`. Rows of a batch do not touch each other."""

    name: ClassVar[str]
    """In commands."""
    summary: ClassVar[str]
    """One line for pages."""

    def __post_init__(self) -> None:
        check_types(self)

    def reveals(self, confidence: Tensor, shown: Tensor, step: int) -> Tensor:
        """Masked places that become the token proposed for them, bool [R, B].

        Args:
            confidence: probability of that token, float64 [R, B]; minus infinity where no mask is.
            shown: what it was where the block's tokens were unmasked, float64 [R, B]; else NaN.
            step: number of the step in the block, from 0.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Quota(Unmasking):
    """Whatever is confident enough; if that is less than the step's part of the block, the best."""

    name = "quota"
    summary = "places above a confidence, or the step's part of the block where those are fewer"

    steps: int = 8
    """Most steps of a block; those that it has to spare take one place more, the first ones."""
    threshold: float = 0.95
    """Confidence above which a place is unmasked; from 1 on, parts alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")

    def reveals(self, confidence: Tensor, shown: Tensor, step: int) -> Tensor:
        size = (confidence.isfinite() | shown.isfinite()).sum(1, keepdim=True)
        quota = size // self.steps + (step < size % self.steps)
        order = confidence.sort(dim=1, descending=True, stable=True).indices
        place = torch.arange(confidence.shape[1], device=confidence.device)
        best = torch.zeros_like(order).scatter(1, order, place.expand_as(order)) < quota
        return best | (confidence > self.threshold)


UNMASKINGS: Table[Unmasking] = Table("unmasking", (Quota,))
"""Policies by name."""


def likeliest(logits: Tensor) -> Tensor:
    """The token of each place with the greatest logit, int64 [R, B]."""
    return logits.argmax(-1)


def fill_block(
    predict: Callable[[Tensor, Tensor, int], Tensor],
    tokens: Tensor,
    hidden: Tensor,
    unmasking: Unmasking,
    *,
    mask: int | None = None,
    propose: Callable[[Tensor], Tensor] = likeliest,
) -> tuple[Tensor, int]:
    """Fill the hidden places of a block, one at least in each step; what is filled stays.

    Args:
        predict: tokens [R, B], which of them are masks, and the number of the step, to logits
            [R, B, V].
        tokens: int64 [R, B]; a mask in hidden places.
        hidden: bool [R, B].
        unmasking: says which places a step fills.
        mask: id that is never proposed.
        propose: logits to a token of each place, int64 [R, B].
    Returns:
        The tokens, and how many steps the row took that had most.
    """
    step, shown = 0, torch.full(tokens.shape, torch.nan, dtype=torch.float64, device=tokens.device)
    while bool(hidden.any()):
        logits = predict(tokens, hidden, step)
        if mask is not None:
            logits = logits.index_fill(-1, torch.tensor([mask], device=logits.device), -torch.inf)
        found = propose(logits)
        confidence = logits.softmax(-1).gather(-1, found[..., None])[..., 0].double()
        confidence = confidence.masked_fill(~hidden, -torch.inf)
        now = unmasking.reveals(confidence, shown, step) & hidden
        best = torch.zeros_like(hidden).scatter(1, confidence.argmax(1, keepdim=True), True)
        now = torch.where(now.any(1, keepdim=True), now, best & hidden)
        tokens, shown = torch.where(now, found, tokens), torch.where(now, confidence, shown)
        hidden, step = hidden & ~now, step + 1
    return tokens, step
