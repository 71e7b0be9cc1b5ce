"""How logits become a choice: routings of one model, and what is made of their logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from etr.table import Table

Deltas = dict[int, Tensor]
"""What is added to the logits of each MoE layer's router, by its index, float [B, E]."""


class Decoding:
    """A frozen config of how to decode; one row of `DECODINGS`.

    `etr.hf.decode` runs the model once for each branch, each with a cache of its own, and hands
    what `combine` makes of their logits to transformers' own search or sampling.
    """

    name: ClassVar[str]
    """In commands."""
    summary: ClassVar[str]
    """One line for pages."""

    @property
    def branches(self) -> tuple[str | None, ...]:
        """The serving policy of each branch, as text; None: as the model is set."""
        raise NotImplementedError

    def combine(self, logits: Sequence[Tensor]) -> Tensor:
        """The logits to choose by, [B, S, V], from those of each branch.

        Places do not touch each other: one token at a time gives what all of them do.
        """
        raise NotImplementedError

    @property
    def refits_after(self) -> int | None:
        """Tokens after which `fit` is called again, and before the first; None: never."""
        return None

    def fit(self, loss: Callable[[Deltas], Tensor], start: Deltas) -> Deltas:
        """What to add to routers' logits from here on, by the text so far.

        Args:
            loss: of deltas, the mean loss of each row's next tokens so far, [B]; rows do not touch
                each other.
            start: of each MoE layer by its index, float [B, E]: what was added before.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Plain(Decoding):
    """The model's own logits."""

    name = "plain"
    summary = "the model's own logits"

    @property
    def branches(self) -> tuple[str | None, ...]:
        return (None,)

    def combine(self, logits: Sequence[Tensor]) -> Tensor:
        return logits[0]


DECODINGS: Table[Decoding] = Table("decoding", (Plain,))
"""Decodings by name."""
