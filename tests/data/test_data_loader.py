"""The loader: every window once, the same order anywhere, resumed to the bit."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from etr.data import (
    IGNORED,
    Batch,
    Corpus,
    Domain,
    TokenDataset,
    TokenLoader,
    byte_tokenizer,
    held_out_batches,
    held_out_documents,
    write_shards,
)
from etr.data.loader import permutation

S = 16
EOS, PAD = 258, 256


def text(seed: int, length: int) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=length))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    domains = (
        Domain(name="big", train=(text(1, 700), text(2, 5), text(3, 400)), held_out=(text(4, 99),)),
        Domain(name="small", train=(text(5, 300),), held_out=(text(6, 3), text(7, 60))),
        Domain(name="none", train=(text(8, 200),), held_out=()),
    )
    folder = tmp_path_factory.mktemp("data") / "shards"
    return write_shards(Corpus(domains=domains), byte_tokenizer(), folder)


def loader(dataset: TokenDataset, **options: Any) -> TokenLoader:
    return TokenLoader(dataset, **{"sequence_length": S, "batch_size": 4, "seed": 7, **options})


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(value, getattr(b, name)) for name, value in vars(a).items())


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


def rows(batches: list[Batch]) -> Counter[tuple[int, ...]]:
    return Counter(
        (int(d), *r.tolist()) for b in batches for d, r in zip(b.domain, b.input_ids, strict=True)
    )


def test_shapes_and_shifted_labels(dataset: TokenDataset) -> None:
    batch = next(loader(dataset))
    for name in ("input_ids", "labels", "position"):
        assert getattr(batch, name).shape == (4, S)
        assert getattr(batch, name).dtype == torch.int64
    assert batch.domain.shape == (4,)
    assert batch.domain.dtype == torch.int64
    assert bool(batch.valid_mask.all())
    assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
    for domain, inputs, labels in zip(batch.domain, batch.input_ids, batch.labels, strict=True):
        stream = dataset.train[int(domain)].tokens.tolist()
        row = [*inputs.tolist(), int(labels[-1])]
        assert any(stream[i : i + S + 1] == row for i in range(0, len(stream), S))


def test_each_window_once_before_any_again(dataset: TokenDataset) -> None:
    # 69 + 18 + 12 = 99 windows; with batches of 3, an epoch is exactly all of them.
    every = loader(dataset, batch_size=3)
    assert every.batches_per_epoch == 33
    for _ in range(3):
        counts = rows(take(every, 33))
        assert len(counts) == 99
        assert set(counts.values()) == {1}


def test_windows_left_over_come_next_epoch(dataset: TokenDataset) -> None:
    some = loader(dataset, batch_size=10)
    assert some.batches_per_epoch == 9
    counts = rows(take(some, 27))
    assert len(counts) == 99
    assert set(counts.values()) <= {2, 3}


def test_epochs_and_seeds_differ(dataset: TokenDataset) -> None:
    first = take(loader(dataset, batch_size=3), 66)
    assert not any(same(a, b) for a, b in zip(first[:33], first[33:], strict=True))
    assert not same(first[0], next(loader(dataset, batch_size=3, seed=8)))


def test_no_global_random_state(dataset: TokenDataset) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = take(loader(dataset), 30)
    torch.rand(5)
    np.random.rand(5)
    state = torch.get_rng_state()
    second = take(loader(dataset), 30)
    assert all(map(same, first, second))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("done", [0, 1, 23, 24, 25, 60])
def test_exact_resume(dataset: TokenDataset, done: int) -> None:
    original = loader(dataset)
    assert original.batches_per_epoch == 24
    take(original, done)
    state = json.loads(json.dumps(original.state_dict()))
    resumed = loader(dataset)
    resumed.load_state_dict(state)
    assert all(map(same, take(original, 50), take(resumed, 50)))
    assert resumed.state_dict() == original.state_dict()


def test_resume_after_another_epoch_was_read(dataset: TokenDataset) -> None:
    reader = loader(dataset)
    state = reader.state_dict()
    first = next(reader)
    take(reader, 40)
    reader.load_state_dict(state)
    assert same(next(reader), first)


@pytest.mark.parametrize(
    "options",
    [{"seed": 8}, {"sequence_length": 8}, {"batch_size": 2},
     {"domain_weights": {"big": 1, "small": 1, "none": 1}}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_state_of_another_loader_is_refused(dataset: TokenDataset, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="resume with the same"):
        loader(dataset, **options).load_state_dict(loader(dataset).state_dict())


@pytest.mark.parametrize("place", [{"index": 24}, {"epoch": -1}, {"index": -1}])
def test_state_out_of_range_is_refused(dataset: TokenDataset, place: dict[str, int]) -> None:
    state = {**loader(dataset).state_dict(), **place}
    with pytest.raises(ValueError, match="an epoch has 24 batches"):
        loader(dataset).load_state_dict(state)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_are_the_global_batch(dataset: TokenDataset, world_size: int) -> None:
    whole = loader(dataset, batch_size=8)
    ranks = [
        loader(dataset, batch_size=8 // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert ranks[0].tokens_per_batch == whole.tokens_per_batch == 8 * S
    for _ in range(2 * whole.batches_per_epoch + 1):
        parts = [next(rank) for rank in ranks]
        joined = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])
        }
        assert same(next(whole), Batch(**joined))
    # A state does not know ranks: two ranks may resume what four began.
    whole.load_state_dict(ranks[-1].state_dict())


def test_proportions_by_size_and_by_weight(dataset: TokenDataset) -> None:
    def share(**options: Any) -> list[int]:
        reader = loader(dataset, batch_size=3, **options)
        return torch.cat([b.domain for b in take(reader, 33)]).bincount(minlength=3).tolist()

    assert share() == [69, 18, 12]
    assert share(domain_weights={"big": 1, "small": 1, "none": 1}) == [33, 33, 33]
    assert share(domain_weights={"big": 0, "small": 2, "none": 1}) == [0, 66, 33]


def test_weighted_windows_before_any_again(dataset: TokenDataset) -> None:
    weights = {"big": 0.0, "small": 1.0, "none": 0.0}
    counts = rows(take(loader(dataset, batch_size=3, domain_weights=weights), 12))
    assert len(counts) == 18
    assert set(counts.values()) == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size=2\), got 2"),
        ({"sequence_length": 250}, "domain 'none' has 201 training tokens"),
        ({"batch_size": 100}, "gives 99 sequences .* fewer than one global batch of 100"),
        ({"domain_weights": {"big": 1}}, "domain_weights must name"),
        ({"domain_weights": {"big": 1, "small": -1, "none": 1}}, "not negative"),
        ({"domain_weights": {"big": 0, "small": 0, "none": 0}}, "not all zero"),
        ({"domain_weights": {"big": float("nan"), "small": 0, "none": 0}}, "finite"),
    ],
)
def test_arguments_are_checked(
    dataset: TokenDataset, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loader(dataset, **options)


def test_documents_within_a_row(dataset: TokenDataset) -> None:
    seen = 0
    for batch in take(loader(dataset, batch_size=3), 33):
        for inputs, position in zip(batch.input_ids.tolist(), batch.position.tolist(), strict=True):
            since = 0
            for t, token in enumerate(inputs):
                assert position[t] == since
                since = 0 if token == EOS else since + 1
            seen += EOS in inputs[:-1]
    assert seen >= 2  # the documents inside "big" begin inside rows


@pytest.mark.parametrize("limit", [1, 8, 16, 17, 40])
def test_held_out_rows_are_spread(dataset: TokenDataset, limit: int) -> None:
    every = list(held_out_batches(dataset, S, 1))
    few = list(held_out_batches(dataset, S, 1, limit))
    for number in range(len(dataset.held_out)):
        rows = [b.labels.tolist() for b in every if int(b.domain[0]) == number]
        taken = [b.labels.tolist() for b in few if int(b.domain[0]) == number]
        count = min(max(limit // S, 1), len(rows))
        assert taken == [rows[i * len(rows) // count] for i in range(count)]


@pytest.mark.parametrize("limit", [None, 10_000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_held_out_counts_each_token_once(
    dataset: TokenDataset, limit: int | None, batch_size: int
) -> None:
    batches = list(held_out_batches(dataset, S, batch_size, limit))
    for number, shard in enumerate(dataset.held_out):
        mine = [batch for batch in batches if int(batch.domain[0]) == number]
        labels = [int(x) for b in mine for x in b.labels[b.valid_mask]]
        inputs = [int(x) for b in mine for x in b.input_ids[b.valid_mask]]
        assert labels == shard.tokens[:limit].tolist()
        assert inputs == [EOS, *labels][: len(labels)]
        for batch in mine:
            assert batch.domain.unique().tolist() == [number]
            assert batch.input_ids.shape[0] <= batch_size
            assert bool((batch.input_ids[~batch.valid_mask] == PAD).all())
            assert bool((batch.labels[~batch.valid_mask] == IGNORED).all())


@pytest.mark.parametrize("arguments", [(0, 1, None), (8, 0, None), (8, 1, 0)])
def test_held_out_arguments(dataset: TokenDataset, arguments: tuple[int, int, int | None]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        held_out_batches(dataset, *arguments)


@pytest.mark.parametrize("limit", [None, 1, 24, 60])
def test_each_label_belongs_to_the_document_that_holds_it(
    dataset: TokenDataset, limit: int | None
) -> None:
    of_label = torch.from_numpy(held_out_documents(dataset, S, limit))
    labels = torch.cat([batch.labels for batch in held_out_batches(dataset, S, 2, limit)])
    assert torch.equal(of_label >= 0, labels != IGNORED)
    texts = []
    for shard in dataset.held_out:
        ends = np.flatnonzero(shard.tokens == dataset.eos_token_id)
        texts += np.split(shard.tokens, ends + 1)[:-1]
    for row, numbers in zip(labels, of_label, strict=True):
        for number in numbers[numbers >= 0].unique():
            part = " ".join(map(str, row[numbers == number].tolist()))
            assert part in " ".join(map(str, texts[number].tolist()))
    if limit is None:
        assert len(of_label[of_label >= 0].unique()) == len(texts)


def test_batch_moves(dataset: TokenDataset) -> None:
    batch = next(loader(dataset)).to("meta")
    assert {value.device.type for value in vars(batch).values()} == {"meta"}


@pytest.mark.parametrize("length", [0, 1, 2, 1000])
def test_permutation(length: int) -> None:
    order = permutation(length, 3, "x")
    assert sorted(order.tolist()) == list(range(length))
    assert np.array_equal(order, permutation(length, 3, "x"))
    if length == 1000:
        assert not np.array_equal(order, permutation(length, 3, "y"))
        assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < 0.1


def test_permutation_never_changes() -> None:
    # Runs are resumed with later versions: this order is part of the format.
    assert permutation(10, 0, "mix", 0).tolist() == [2, 0, 5, 7, 9, 3, 1, 4, 6, 8]
