"""What a language model is trained on: text to an example, and its logits to losses."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.moe.context import RoutingContext

IGNORED = -100
"""Label of a place that counts for no loss."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """B rows of S tokens as they stand in a corpus.

    Args:
        ids: int64 [B, S].
        following: the token after each; `IGNORED` on padding, and where a document begins with a
            token that no model has to predict. int64 [B, S].
        valid: False on padding, bool [B, S]; None where there is none.
    """

    ids: Tensor
    following: Tensor
    valid: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """What a model is given for some text, S' places a row, and what it must answer.

    Args:
        input_ids: int64 [B, S'].
        labels: int64 [B, S']; `IGNORED` where nothing is asked.
        counted: places whose number the summed loss is divided by, bool [B, S'].
        valid: places that are routed and seen, bool [B, S']; None for all.
        attention: which place (row of the matrix) sees which, bool [B, S', S']; None where each
            sees itself and the valid ones before it.
        position_ids: int64 [B, S']; None for 0, 1, ...
        weight: of each place's loss, float [B, S']; None for 1.
        block, time: of each place, as a `RoutingContext` has them, int64 and float [B, S'], where
            `attention` is given; or None.
    """

    input_ids: Tensor
    labels: Tensor
    counted: Tensor
    valid: Tensor | None = None
    attention: Tensor | None = None
    position_ids: Tensor | None = None
    weight: Tensor | None = None
    block: Tensor | None = None
    time: Tensor | None = None

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Of the model's forward.

        Args:
            dtype: of the computation, for the mask that is added to attention's scores.
        """
        found: dict[str, Any] = {"input_ids": self.input_ids}
        if self.attention is not None:
            hidden = torch.zeros_like(self.attention, dtype=dtype)
            hidden = hidden.masked_fill(~self.attention, torch.finfo(dtype).min)
            found["attention_mask"] = hidden[:, None]
            found["routing_context"] = RoutingContext(
                valid_mask=self.valid, block=self.block, time=self.time
            )
        elif self.valid is not None:
            found["attention_mask"] = self.valid.long()
        if self.position_ids is not None:
            found["position_ids"] = self.position_ids
        return found

    def rows(self, chosen: slice) -> Example:
        """Some of the rows."""
        parts: dict[str, Any] = {
            name: None if value is None else value[chosen] for name, value in vars(self).items()
        }
        return Example(**parts)


class Objective:
    """A frozen config of what is trained on; one row of `OBJECTIVES`."""

    name: ClassVar[str]
    """In commands."""
    summary: ClassVar[str]
    """One line for pages."""
    bound: ClassVar[bool] = False
    """Whether the mean loss is an upper bound of the text's nats per token, and not those."""
    fills: ClassVar[bool] = False
    """Whether a model writes by filling masked places of a block (`etr.hf.fill`), and not token
    after token."""

    def masked_by(self, mask: int | None) -> Objective:
        """The same, with the id of a tokenizer's mask token (None where it has none) if it asks."""
        return self

    def served_by(self, selection: str) -> tuple[str, str | None]:
        """How experts select where `selection` is asked for, and why, where it is another."""
        return selection, None

    def example(self, text: Text, generator: torch.Generator) -> Example:
        """What the model is given for some text.

        Args:
            generator: of whatever is drawn; on the CPU, so that every device sees the same.
        """
        raise NotImplementedError

    def losses(self, logits: Tensor, example: Example) -> Tensor:
        """Loss of each place, float [B * S']; 0 where nothing is asked.

        Args:
            logits: [B, S', V].
        """
        nats = F.cross_entropy(
            _wide(logits), example.labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return nats if example.weight is None else nats * example.weight.flatten()

    def total(self, logits: Tensor, example: Example) -> Tensor:
        """Sum of the losses, as it is trained on."""
        return self.losses(logits, example).sum()


@dataclass(frozen=True, kw_only=True)
class Causal(Objective):
    """Cross-entropy of the next token, from those before it."""

    name = "causal"
    summary = "the next token, from those before it"

    def example(self, text: Text, generator: torch.Generator) -> Example:
        return Example(
            input_ids=text.ids,
            labels=text.following,
            counted=text.following != IGNORED,
            valid=text.valid,
        )

    def total(self, logits: Tensor, example: Example) -> Tensor:
        return F.cross_entropy(
            _wide(logits), example.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )


def draws(*key: object) -> torch.Generator:
    """A generator whose draws depend on `key` alone: on a seed, the number of a batch, a rank."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _wide(logits: Tensor) -> Tensor:
    """Rows of logits in float32 at least, [B * S', V]."""
    rows = logits.flatten(0, 1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
