"""Tokenizers that begin texts with bos: documents have it, and no model has to predict it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bos_tokenizer import BOS, EOS, bos_tokenizer

from etr.data import (
    IGNORED,
    Batch,
    Corpus,
    DataConfig,
    Domain,
    TokenDataset,
    TokenLoader,
    byte_tokenizer,
    held_out_batches,
    open_data,
    write_shards,
)

TEXTS = ("abc", "de", "", "f<bos>g")
CORPUS = Corpus(domains=(Domain(name="a", train=TEXTS * 3, held_out=TEXTS),))


def dataset(folder: Path, single: str) -> TokenDataset:
    return write_shards(CORPUS, bos_tokenizer(single), folder)


@pytest.mark.parametrize("single", ["<bos> $A", "<bos> $A <eos>"])
def test_every_document_begins_and_ends_once(single: str, tmp_path: Path) -> None:
    data = dataset(tmp_path / "s", single)
    assert data.document_start == (BOS,)
    for shard in (*data.train, *data.held_out):
        places = zip(shard.document_offsets, shard.document_offsets[1:], strict=False)
        for (begin, end), text in zip(places, TEXTS * 3, strict=False):
            assert shard.tokens[begin:end].tolist() == [BOS, *text.encode(), EOS]


@pytest.mark.parametrize("single", ["$A", "$A <eos>", "<eos> $A"])
def test_where_texts_begin_with_nothing_or_an_end_documents_just_follow(
    single: str, tmp_path: Path
) -> None:
    data = dataset(tmp_path / "s", single)
    plain = write_shards(CORPUS, byte_tokenizer(), tmp_path / "plain")
    assert data.document_start == ()
    assert np.array_equal(data.train[0].tokens, plain.train[0].tokens)


def test_bos_is_an_input_and_never_a_label(tmp_path: Path) -> None:
    batches = list(held_out_batches(dataset(tmp_path / "s", "<bos> $A"), 100, 1))
    (batch,) = batches
    stream = [EOS, *(t for text in TEXTS for t in (BOS, *text.encode(), EOS))]
    used = len(stream) - 1
    assert batch.input_ids[0, :used].tolist() == stream[:-1]
    expected = [IGNORED if token == BOS else token for token in stream[1:]]
    assert batch.labels[0].tolist() == expected + [IGNORED] * (100 - used)
    assert batch.valid_mask[0].tolist() == [True] * used + [False] * (100 - used)
    places = [0, *(place for text in TEXTS for place in range(len(text.encode()) + 2))]
    assert batch.position[0, :used].tolist() == places[:-1]


def test_bytes_are_counted_per_predicted_token(tmp_path: Path) -> None:
    data = dataset(tmp_path / "s", "<bos> $A")
    labels = sum(int((b.labels != IGNORED).sum()) for b in held_out_batches(data, 8, 2))
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert labels == num_bytes + len(TEXTS)
    assert data.bytes_per_token == {"a": num_bytes / labels}


def test_training_rows_have_the_same_labels(tmp_path: Path) -> None:
    data = dataset(tmp_path / "s", "<bos> $A")
    batch = next(TokenLoader(data, sequence_length=8, batch_size=2))
    assert bool((batch.input_ids == BOS).any())
    following = batch.input_ids[:, 1:]
    expected = torch.where(following == BOS, IGNORED, following)
    assert torch.equal(batch.labels[:, :-1], expected)
    assert not bool((batch.labels == BOS).any())


def test_padding_is_what_follows_the_last_label() -> None:
    labels = torch.tensor([[3, IGNORED, 4, IGNORED], [IGNORED, IGNORED, 5, 6], [IGNORED] * 4])
    other = torch.zeros_like(labels)
    batch = Batch(input_ids=other, labels=labels, domain=other[:, 0], position=other)
    assert batch.valid_mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_tokens_that_an_older_version_cached_are_not_taken(tmp_path: Path) -> None:
    """They lack bos; the tokenizer is the same."""
    (tmp_path / "a.txt").write_text("some text\n" * 300)
    bos_tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = DataConfig(
        data=(str(tmp_path / "a.txt"),),
        tokenizer=str(tmp_path / "tokenizer"),
        cache_dir=str(tmp_path / "cache"),
    )
    opened = open_data(config).dataset
    assert opened.train[0].tokens[0] == BOS
    (folder,) = (tmp_path / "cache").iterdir()
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format": "etr-token-shards-1"}))
    with pytest.warns(UserWarning, match="token cache is damaged"):
        assert open_data(config).dataset.fingerprint == opened.fingerprint


def test_the_fingerprint_knows_the_start(tmp_path: Path) -> None:
    with_bos = dataset(tmp_path / "a", "<bos> $A")
    without = TokenDataset(**{**vars(with_bos), "document_start": ()})
    assert with_bos.fingerprint != without.fingerprint
