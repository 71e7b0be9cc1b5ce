"""Token shards: what is written is what is read, and anything else is refused clearly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from etr.data import Corpus, Domain, TokenDataset, byte_tokenizer, shards, write_shards

TOKENIZER = byte_tokenizer()
CORPUS = Corpus(
    domains=(
        Domain(name="a/b", train=("héllo", "one more"), held_out=("kept",)),
        Domain(name="c", train=("x" * 2000,), held_out=()),
    ),
    notes=("a remark",),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(CORPUS, TOKENIZER, tmp_path / "deep" / "shards")
    return tmp_path / "deep" / "shards"


def test_round_trip(folder: Path) -> None:
    dataset = TokenDataset.open(folder, verify=True)
    assert dataset.domains == ("a/b", "c")
    assert dataset.notes == ("a remark",)
    assert (dataset.vocab_size, dataset.eos_token_id, dataset.pad_token_id) == (264, 258, 256)
    assert dataset.corpus_fingerprint == CORPUS.fingerprint
    for split in ("train", "held_out"):
        for domain, shard in zip(CORPUS.domains, getattr(dataset, split), strict=True):
            texts = getattr(domain, split)
            assert shard.split == split
            assert shard.num_bytes == sum(len(text.encode()) for text in texts)
            assert len(shard.document_offsets) == len(texts) + 1
            pairs = zip(shard.document_offsets, shard.document_offsets[1:], strict=False)
            documents = [shard.tokens[a:b].tolist() for a, b in pairs]
            assert documents == [[*text.encode(), 258] for text in texts]


def test_tokens_are_memory_mapped_and_small(folder: Path) -> None:
    shard = TokenDataset.open(folder).train[0]
    assert isinstance(shard.tokens, np.memmap)
    assert shard.tokens.dtype == np.uint16
    assert not shard.tokens.flags.writeable


def test_large_vocabularies_take_four_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(TOKENIZER), "__len__", lambda self: 70_000)
    monkeypatch.setattr(
        shards, "encode_documents", lambda tokenizer, texts: [np.array([69_000]) for _ in texts]
    )
    tokens = write_shards(CORPUS, TOKENIZER, tmp_path / "s").train[0].tokens
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [69_000, 258, 69_000, 258]


def test_bytes_per_token(folder: Path) -> None:
    assert TokenDataset.open(folder).bytes_per_token == {"a/b": 4 / 5, "c": 2000 / 2001}


def test_documents_encoded_some_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_DOCUMENTS_AT_ONCE", 1)
    write_shards(CORPUS, TOKENIZER, tmp_path / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def foreign(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def other_dtype(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float16))


def pickled(path: Path) -> None:
    size = path.stat().st_size
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    content = path.read_bytes()
    path.write_bytes(content + b"\0" * (size - len(content)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated or foreign"),
        (flip, "checksum"),
        (foreign, "checksum"),
        (Path.unlink, "is missing"),
    ],
)
def test_damaged_shard(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder / "001-train.npy")
    with pytest.raises((ValueError, FileNotFoundError), match=r"001-train\.npy.*" + message):
        TokenDataset.open(folder, verify=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(foreign, "no .npy file"), (other_dtype, "holds float16"), (pickled, "no .npy file")],
)
def test_foreign_shard_without_checksum(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder / "001-train.npy")
    with pytest.raises(ValueError, match=message):
        TokenDataset.open(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not complete JSON"),
        ("[]", "must hold a JSON object, not list"),
        ('{"format": "other"}', "is not an index of token shards"),
        (json.dumps({"format": shards.FORMAT}), "incomplete"),
        (json.dumps({"format": shards.FORMAT, "shards": [{}]}), "incomplete"),
    ],
)
def test_damaged_index(folder: Path, content: str, message: str) -> None:
    (folder / "index.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        TokenDataset.open(folder)


def test_index_never_points_outside(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "000-train.npy").rename(folder.parent / "000-train.npy")
    index["shards"][0]["file"] = "../000-train.npy"
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="is missing"):
        TokenDataset.open(folder)


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
        TokenDataset.open(tmp_path)


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds 'thesis\.tex'"):
        write_shards(CORPUS, TOKENIZER, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_tokenizer_without_eos(tmp_path: Path) -> None:
    bare = byte_tokenizer()
    bare.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        write_shards(CORPUS, bare, tmp_path / "s")


@pytest.mark.parametrize("damage", [None, truncate, flip])
def test_writing_again_replaces_and_leaves_nothing_behind(
    folder: Path, damage: Callable[[Path], None] | None
) -> None:
    if damage:
        damage(folder / "000-train.npy")
    write_shards(CORPUS, TOKENIZER, folder)
    assert TokenDataset.open(folder, verify=True).corpus_fingerprint == CORPUS.fingerprint
    other = Corpus(domains=CORPUS.domains[:1])
    assert write_shards(other, TOKENIZER, folder).domains == ("a/b",)
    assert [path.name for path in folder.parent.iterdir()] == ["shards"]
    assert len(list(folder.iterdir())) == 3


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(shards, "encode_documents", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        write_shards(CORPUS, TOKENIZER, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []
