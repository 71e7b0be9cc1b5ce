"""A batch of token sequences, as training and evaluation take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etr.model.objective import IGNORED, Text

__all__ = ["IGNORED", "Batch", "make_batch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows of S tokens; each row is a stretch of one domain's documents, end to end."""

    input_ids: Tensor
    """Token ids, int64 [B, S]."""
    labels: Tensor
    """The token after each input token, already shifted; `IGNORED` on padding and where a document
    is about to begin with a token that no model has to predict. int64 [B, S]."""
    domain: Tensor
    """Place of each row's domain in `TokenDataset.domains`, int64 [B]."""
    position: Tensor
    """Tokens since the document's beginning or the row's, whichever is later, int64 [B, S]."""

    @property
    def valid_mask(self) -> Tensor:
        """True up to a row's last label, False on the padding after it, bool [B, S]."""
        return (self.labels != IGNORED).flip(1).cumsum(1).flip(1) > 0

    def text(self, *, padded: bool = True) -> Text:
        """The rows as an objective takes them.

        Args:
            padded: whether there may be padding; training rows have none.
        """
        valid = self.valid_mask if padded else None
        return Text(ids=self.input_ids, following=self.labels, valid=valid)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def make_batch(
    rows: Sequence[NDArray[np.integer]],
    domain: NDArray[np.int64],
    *,
    sequence_length: int,
    eos_token_id: int,
    pad_token_id: int,
    document_start: Sequence[int] = (),
) -> Batch:
    """Batch rows of up to S + 1 consecutive tokens: S inputs and, one further, S labels.

    Args:
        rows: 2 to S + 1 tokens each; shorter rows are padded.
        domain: the rows' domains, [B].
        sequence_length: S, tokens.
        eos_token_id: ends a document.
        pad_token_id: input where a row has ended.
        document_start: tokens that begin every document; they are inputs and never labels.
    """
    inputs = np.full((len(rows), sequence_length), pad_token_id, dtype=np.int64)
    labels = np.full((len(rows), sequence_length), IGNORED, dtype=np.int64)
    for i, row in enumerate(rows):
        inputs[i, : len(row) - 1] = row[:-1]
        labels[i, : len(row) - 1] = row[1:]
    starts = np.zeros(inputs.shape, dtype=bool)
    starts[:, 1:] = (inputs[:, :-1] == eos_token_id) & (labels[:, 1:] != IGNORED)
    labels[np.isin(labels, document_start)] = IGNORED
    place = np.arange(sequence_length)
    position = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    return Batch(
        input_ids=torch.from_numpy(inputs),
        labels=torch.from_numpy(labels),
        domain=torch.from_numpy(domain.astype(np.int64)),
        position=torch.from_numpy(position),
    )
