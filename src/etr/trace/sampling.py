"""Which held-out text a trace is of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from etr.data import Batch, TokenDataset, held_out_batches


@dataclass(frozen=True, kw_only=True)
class SampledRows:
    """Batches of held-out rows, evenly spread over all rows, domain after domain.

    So few tokens still come from many documents, and each domain has its share. Iterating again
    gives the same batches; `len` is their number.
    """

    dataset: TokenDataset
    """What to read."""
    sequence_length: int
    """Tokens of a row."""
    batch_size: int
    """Rows of a batch; the last may have fewer."""
    max_tokens: int | None = None
    """Most tokens, rounded down to whole rows but at least one; all where None."""

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    def __len__(self) -> int:
        return math.ceil(len(self._chosen()) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        chosen = self._chosen()
        waiting: list[Batch] = []
        # A row at a time: they are read from disk as they are used, and making one is cheap.
        for number, row in enumerate(held_out_batches(self.dataset, self.sequence_length, 1)):
            if number not in chosen:
                continue
            waiting.append(row)
            if len(waiting) == self.batch_size:
                yield _joined(waiting)
                waiting = []
        if waiting:
            yield _joined(waiting)

    def _chosen(self) -> set[int]:
        lengths = [len(shard.tokens) for shard in self.dataset.held_out]
        rows = sum(math.ceil(length / self.sequence_length) for length in lengths)
        if self.max_tokens is None:
            return set(range(rows))
        count = min(max(self.max_tokens // self.sequence_length, 1), rows)
        return {i * rows // count for i in range(count)}


def _joined(rows: list[Batch]) -> Batch:
    """Rows as one batch."""
    return Batch(**{name: torch.cat([vars(row)[name] for row in rows]) for name in vars(rows[0])})
