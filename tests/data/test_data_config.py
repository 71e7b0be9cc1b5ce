"""Settings to data: everything cached, damaged caches rebuilt, processes at once."""

from __future__ import annotations

import dataclasses
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from etr.data import DataConfig, builtin, open_data
from etr.data import config as config_module


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(300)]
    (tmp_path / "text.txt").write_text(
        "\n".join(" ".join(rng.choices(words, k=9)) for _ in range(900))
    )
    return DataConfig(data=(str(tmp_path / "text.txt"),), cache_dir=str(tmp_path / "cache"))


def test_second_opening_uses_the_cache(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_data(config)
    monkeypatch.setattr(config_module, "write_shards", None)
    second = open_data(config)
    assert first.dataset.domains == ("text",)
    assert second.dataset.fingerprint == first.dataset.fingerprint
    assert np.array_equal(first.dataset.train[0].tokens, second.dataset.train[0].tokens)


def test_changed_text_is_noticed(config: DataConfig) -> None:
    before = open_data(config)
    path = Path(config.data[0])
    path.write_text(path.read_text() + "\nmore")
    assert open_data(config).dataset.fingerprint != before.dataset.fingerprint


@pytest.mark.parametrize("name", ["000-train.npy", "index.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_shards_are_rebuilt(config: DataConfig, name: str, damage: str) -> None:
    tokens = np.array(open_data(config).dataset.train[0].tokens)
    (path,) = Path(config.cache_dir).glob(f"tokens-*/{name}")
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:-7])
    with pytest.warns(UserWarning, match="token cache is damaged"):
        opened = open_data(config)
    assert np.array_equal(opened.dataset.train[0].tokens, tokens)
    assert path.read_bytes() == content


def test_many_at_once(config: DataConfig) -> None:
    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = list(pool.map(open_data, [config] * 8))
    assert len({data.dataset.fingerprint for data in opened}) == 1
    assert [path.name[:7] for path in Path(config.cache_dir).iterdir()] == ["tokens-"]


def test_many_at_once_on_a_damaged_cache(config: DataConfig) -> None:
    fingerprint = open_data(config).dataset.fingerprint
    (path,) = Path(config.cache_dir).glob("tokens-*/000-train.npy")
    path.write_bytes(b"short")
    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = list(pool.map(open_data, [config] * 8))
    assert {data.dataset.fingerprint for data in opened} == {fingerprint}
    assert len(list(Path(config.cache_dir).iterdir())) == 1


def test_bpe_is_trained_once(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, tokenizer="bpe:400")
    first = open_data(config)
    assert first.dataset.vocab_size == len(first.tokenizer) == 400
    assert first.dataset.bytes_per_token["text"] > 1.5
    monkeypatch.setattr(config_module, "train_bpe", None)
    assert open_data(config).dataset.fingerprint == first.dataset.fingerprint


def test_builtin_and_own_text_together(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source in builtin.SOURCES.items():
        empty = dataclasses.replace(source, find=list)
        monkeypatch.setitem(builtin.SOURCES, name, empty)
    config = dataclasses.replace(
        config, data=("builtin", *config.data), max_bytes_per_domain=20_000
    )
    opened = open_data(config)
    assert opened.dataset.domains == (*builtin.SOURCES, "text")
    assert any("made up" in note for note in opened.notes)
    assert opened.dataset.notes == opened.notes


def test_domains_of_the_builtin_text_are_those_of_the_whole(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its order, with its split, whatever else is named."""
    for name, source in builtin.SOURCES.items():
        monkeypatch.setitem(builtin.SOURCES, name, dataclasses.replace(source, find=list))
    small = dataclasses.replace(config, data=("builtin",), max_bytes_per_domain=10_000)
    whole = open_data(small).dataset
    some = dataclasses.replace(small, data=("builtin:math", "builtin:cpp"))
    found = open_data(some).dataset
    assert found.domains == ("cpp", "math")
    for place, name in enumerate(found.domains):
        for part, all_parts in ((found.train, whole.train), (found.held_out, whole.held_out)):
            same = all_parts[whole.domains.index(name)].tokens
            assert np.array_equal(part[place].tokens, same)
    both = dataclasses.replace(small, data=("builtin:cpp", *config.data))
    assert open_data(both).dataset.domains == ("cpp", "text")
    with pytest.raises(ValueError, match="built-in domain='rust' is unknown; choose one of python"):
        dataclasses.replace(small, data=("builtin:rust",))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("data", ()),
        ("data", ("",)),
        ("tokenizer", ""),
        ("tokenizer", "bpe:"),
        ("tokenizer", "bpe:many"),
        ("sequence_length", 0),
        ("batch_size", 0),
        ("max_bytes_per_domain", 9_999),
        ("cache_dir", ""),
    ],
)
def test_fields_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        DataConfig(**{field: value})
