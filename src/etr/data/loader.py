"""Batches for training, in an order that can be resumed exactly, and for evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etr.data.batch import Batch, make_batch
from etr.data.shards import TokenDataset
from etr.files import sha256

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class TokenLoader:
    """An endless iterator over training batches.

    1. Each domain's training tokens are cut into windows of `sequence_length` inputs (the label
       of a window's last input is the next window's first).
    2. A domain's windows are visited in a seeded permutation, all of them before any again, then
       in another permutation, and so on.
    3. An epoch is a whole number of global batches, about as many windows as there are; each
       domain gets its share, by size or by `domain_weights`, mixed by a permutation of its own.
    4. Rank r of n takes rows r * batch_size to (r + 1) * batch_size of each global batch.

    The order depends on the data, seed, sequence length, weights and global batch size alone: not
    on the rank count, the platform, nor any global random state. The state is two numbers.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        domain_weights: Mapping[str, float] | None = None,
    ) -> None:
        """Start at the first batch of epoch 0.

        Args:
            dataset: what to read.
            sequence_length: tokens per row, S.
            batch_size: rows per batch on this rank; the global batch has world_size times more.
            seed: of the order.
            rank: this reader's number, in [0, world_size).
            world_size: readers that share the global batch.
            domain_weights: relative share of rows of every domain; by size where None.
        Raises:
            ValueError: an argument out of range, a domain with fewer than S + 1 tokens, or less
                data than one global batch.
        """
        for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        """Epochs completed."""
        self.index = 0
        """Global batches of this epoch already given."""
        self._rank = rank
        self._global_batch_size = batch_size * world_size
        self._num_windows = _num_windows(dataset, sequence_length)
        self._rows_per_epoch = self._share_rows(domain_weights)
        self._plan: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._fingerprint = sha256(
            dataset.fingerprint,
            json.dumps([sequence_length, self._global_batch_size, self._rows_per_epoch.tolist()]),
        )

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return int(self._rows_per_epoch.sum()) // self._global_batch_size

    @property
    def tokens_per_batch(self) -> int:
        """Input tokens of a global batch, over all ranks."""
        return self._global_batch_size * self.sequence_length

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch of this rank; never ends."""
        if self._plan is None or self._plan[0] != self.epoch:
            self._plan = (self.epoch, *self._epoch_order(self.epoch))
        _, domains, windows = self._plan
        first = self.index * self._global_batch_size + self._rank * self.batch_size
        rows = slice(first, first + self.batch_size)
        batch = make_batch(
            [self._window(d, w) for d, w in zip(domains[rows], windows[rows], strict=True)],
            domains[rows],
            sequence_length=self.sequence_length,
            eos_token_id=self.dataset.eos_token_id,
            pad_token_id=self.dataset.pad_token_id,
            document_start=self.dataset.document_start,
        )
        self.index += 1
        if self.index == self.batches_per_epoch:
            self.epoch, self.index = self.epoch + 1, 0
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator stands: plain numbers and strings, the same on every rank."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "seed": self.seed,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken: the batches that follow are the same, bit for bit.

        Args:
            state: from `state_dict` of a loader with the same data, seed, sequence length,
                weights and global batch size; the number of ranks may differ.
        Raises:
            ValueError: the state is of a loader that differs in one of these.
        """
        for name, own in (("seed", self.seed), ("fingerprint", self._fingerprint)):
            if state.get(name) != own:
                raise ValueError(
                    f"loader state has {name} {state.get(name)!r}, this loader {own!r}: resume "
                    "with the same data, seed, sequence length, weights and global batch size"
                )
        epoch, index = int(state["epoch"]), int(state["index"])
        if epoch < 0 or not 0 <= index < self.batches_per_epoch:
            raise ValueError(
                f"loader state is at epoch {epoch}, index {index}: an epoch has "
                f"{self.batches_per_epoch} batches"
            )
        self.epoch, self.index = epoch, index

    def _window(self, domain: int, window: int) -> NDArray[np.unsignedinteger]:
        start = window * self.sequence_length
        return self.dataset.train[domain].tokens[start : start + self.sequence_length + 1]

    def _share_rows(self, weights: Mapping[str, float] | None) -> NDArray[np.int64]:
        """Rows of each domain in an epoch, whole global batches together."""
        available = int(self._num_windows.sum())
        total = available - available % self._global_batch_size
        if not total:
            raise ValueError(
                f"the training data gives {available} sequences of {self.sequence_length} tokens, "
                f"fewer than one global batch of {self._global_batch_size}"
            )
        if weights is None:
            return _apportion(self._num_windows.astype(np.float64), total)
        if set(weights) != set(self.dataset.domains):
            raise ValueError(
                f"domain_weights must name {sorted(self.dataset.domains)}, got {sorted(weights)}"
            )
        values = np.array([weights[name] for name in self.dataset.domains], dtype=np.float64)
        if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
            raise ValueError(
                f"domain_weights must be finite, not negative and not all zero, got {dict(weights)}"
            )
        return _apportion(values, total)

    def _epoch_order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Domain and window of each row of an epoch, [rows]."""
        domains = np.repeat(np.arange(len(self._rows_per_epoch)), self._rows_per_epoch)
        domains = domains[permutation(len(domains), self.seed, "mix", epoch)]
        windows = np.empty_like(domains)
        for domain in range(len(self._rows_per_epoch)):
            windows[domains == domain] = self._domain_windows(domain, epoch)
        return domains, windows

    def _domain_windows(self, domain: int, epoch: int) -> NDArray[np.int64]:
        """An epoch's stretch of the domain's endless sequence of permutations."""
        count, rows = int(self._num_windows[domain]), int(self._rows_per_epoch[domain])
        cycle, place = np.divmod(np.arange(epoch * rows, (epoch + 1) * rows), count)
        windows = np.empty(rows, dtype=np.int64)
        for number in np.unique(cycle).tolist():
            inside = cycle == number
            windows[inside] = permutation(count, self.seed, domain, number)[place[inside]]
        return windows


def held_out_batches(
    dataset: TokenDataset,
    sequence_length: int,
    batch_size: int,
    max_tokens_per_domain: int | None = None,
) -> Iterator[Batch]:
    """Held-out tokens, domain after domain, always in the same order.

    Without a limit every token is a label exactly once (eos stands before a domain's first), but
    for those that only begin a document; with one, evenly spaced rows are taken, so that they come
    from many documents. The last row of a domain is padded; a batch has rows of one domain, the
    domain's last batch perhaps fewer. A domain with nothing held out gives no batch.

    Args:
        dataset: what to read.
        sequence_length: tokens per row, S.
        batch_size: most rows per batch.
        max_tokens_per_domain: most tokens of each domain, rounded down to whole rows but at least
            one; all where None.
    Raises:
        ValueError: an argument is under 1.
    """
    limit = _limit(sequence_length, batch_size, max_tokens_per_domain)
    return _held_out_batches(dataset, sequence_length, batch_size, limit)


def held_out_documents(
    dataset: TokenDataset, sequence_length: int, max_tokens_per_domain: int | None = None
) -> NDArray[np.int64]:
    """Which document each label of `held_out_batches` belongs to, in the batches' order.

    Args:
        dataset: what to read.
        sequence_length: tokens per row, S.
        max_tokens_per_domain: as there.
    Returns:
        Number of the document, counted through all domains, [rows, S]; -1 on padding.
    Raises:
        ValueError: an argument is under 1.
    """
    limit = _limit(sequence_length, 1, max_tokens_per_domain)
    found, first = [], 0
    for _, stream, starts in _held_out_rows(dataset, sequence_length, limit):
        of_label = first - 1 + np.cumsum(stream[:-1] == dataset.eos_token_id)
        first += int((stream == dataset.eos_token_id).sum()) - 1
        for start in starts:
            row = of_label[start : start + sequence_length]
            found.append(np.pad(row, (0, sequence_length - len(row)), constant_values=-1))
    return np.stack(found) if found else np.empty((0, sequence_length), dtype=np.int64)


def _limit(sequence_length: int, batch_size: int, max_tokens_per_domain: int | None) -> int:
    limit = np.iinfo(np.int64).max if max_tokens_per_domain is None else max_tokens_per_domain
    for name, value in (
        ("sequence_length", sequence_length),
        ("batch_size", batch_size),
        ("max_tokens_per_domain", limit),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return int(limit)


def _held_out_rows(
    dataset: TokenDataset, sequence_length: int, limit: int
) -> Iterator[tuple[int, NDArray[np.int64], list[int]]]:
    """Each domain's number, its tokens after an eos, and where its rows begin in them."""
    for number, shard in enumerate(dataset.held_out):
        stream = np.concatenate([[dataset.eos_token_id], shard.tokens])
        rows = range(0, len(stream) - 1, sequence_length)
        yield number, stream, spread(rows, limit // sequence_length)


def _held_out_batches(
    dataset: TokenDataset, sequence_length: int, batch_size: int, limit: int
) -> Iterator[Batch]:
    for number, stream, starts in _held_out_rows(dataset, sequence_length, limit):
        for first in range(0, len(starts), batch_size):
            rows = [
                stream[start : start + sequence_length + 1]
                for start in starts[first : first + batch_size]
            ]
            yield make_batch(
                rows,
                np.full(len(rows), number, dtype=np.int64),
                sequence_length=sequence_length,
                eos_token_id=dataset.eos_token_id,
                pad_token_id=dataset.pad_token_id,
                document_start=dataset.document_start,
            )


def spread(starts: range, count: int) -> list[int]:
    """At most `count` (but at least one) of the starts, evenly spaced, so that few tokens still
    come from many documents."""
    count = min(max(count, 1), len(starts))
    return [starts[i * len(starts) // count] for i in range(count)]


def permutation(length: int, *key: int | str) -> NDArray[np.int64]:
    """A permutation of range(length) that depends on `key` alone, [length].

    Sorts a counter-based hash (SplitMix64) of each place, so that it is the same with every
    version of every library.
    """
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")
    z = np.uint64(seed) + np.arange(length, dtype=np.uint64) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")


def _num_windows(dataset: TokenDataset, sequence_length: int) -> NDArray[np.int64]:
    counts = [(len(shard.tokens) - 1) // sequence_length for shard in dataset.train]
    for shard, count in zip(dataset.train, counts, strict=True):
        if not count:
            raise ValueError(
                f"domain {shard.domain!r} has {len(shard.tokens)} training tokens, fewer than "
                f"sequence_length + 1 = {sequence_length + 1}; give more text or a shorter length"
            )
    return np.array(counts, dtype=np.int64)


def _apportion(weights: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers in proportion to `weights`, `total` together (largest remainders)."""
    exact = weights / weights.sum() * total
    parts = np.floor(exact).astype(np.int64)
    parts[np.argsort(parts - exact, kind="stable")[: total - int(parts.sum())]] += 1
    return parts
