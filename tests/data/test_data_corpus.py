"""Corpora from files: naming of domains, and clear errors."""

from __future__ import annotations

import gzip
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from etr.data import Corpus, load_corpus, merge


def prose(seed: int, num_words: int = 200) -> str:
    rng = random.Random(seed)
    return "".join(
        "".join(rng.choices("abcdefghij", k=5)) + " \n"[i % 9 == 0] for i in range(num_words)
    )


def texts(corpus: Corpus) -> dict[str, str]:
    return {d.name: "".join(sorted(d.train + d.held_out)) for d in corpus.domains}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    for name in (
        "top.txt",
        "wiki/a.txt",
        "wiki/deep/b.md",
        "code/c.py",
        "code/skip.bin",
        ".git/x.txt",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name + prose(len(name)))
    return root


@pytest.mark.filterwarnings("ignore:.*files left out")
def test_domains_of_a_folder(folder: Path) -> None:
    found = texts(load_corpus([folder]))
    assert sorted(found) == ["code", "mine", "wiki"]
    assert "deep/b.md" in found["wiki"]
    assert "skip" not in found["code"]


def test_a_named_file_is_its_own_domain(folder: Path) -> None:
    assert [d.name for d in load_corpus([folder / "wiki" / "a.txt"]).domains] == ["a"]
    assert [d.name for d in load_corpus([folder / "code" / "skip.bin"]).domains] == ["skip"]


def test_one_long_file_has_something_held_out(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(prose(1, 20_000))
    (domain,) = load_corpus([path]).domains
    share = len("".join(domain.held_out)) / path.stat().st_size
    assert 0.04 < share < 0.2


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    lines = [{"text": prose(1), "domain": "law"}, {"text": prose(2)}, {"text": "été 😀" + prose(3)}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    found = texts(load_corpus([path]))
    assert sorted(found) == ["law", "records"]
    assert "été 😀" in found["records"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 3: not JSON"),
        ('{"body": "x"}', 'line 3: no text; .*"text"'),
        ('["x"]', "line 3: no text"),
        ('{"text": 5}', "line 3: no text"),
        ('{"text": "x", "domain": 5}', 'line 3: "domain"'),
        ('{"text": "\\ud800"}', "line 3: holds a lone surrogate"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl.*" + message):
        load_corpus([path])


def test_undecodable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt.*not UTF-8"):
        load_corpus([tmp_path])


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_corpus([tmp_path / "nowhere"])


@pytest.mark.parametrize("content", [None, "", " \n\t\n"])
def test_empty_corpus(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ValueError, match="corpus is empty"):
        load_corpus([tmp_path])


def test_from_documents_errors() -> None:
    with pytest.raises(ValueError, match="no domain"):
        Corpus.from_documents({})
    with pytest.raises(ValueError, match="'b' has no text of its own"):
        Corpus.from_documents({"a": ["same"], "b": ["same"]})
    with pytest.raises(ValueError, match="held_out_fraction"):
        Corpus.from_documents({"a": ["x"]}, held_out_fraction=1.0)


def test_too_little_to_hold_out_is_noted() -> None:
    corpus = Corpus.from_documents({"a": ["one small document"]})
    assert corpus.domains[0].held_out == ()
    assert "a: 0 of 18 bytes held out" in corpus.notes[0]


def test_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert load_corpus([tmp_path / "w.txt"]).domains[0].train == ("one\ntwo\nthree\n",)


def test_fingerprint_sees_every_document() -> None:
    one = Corpus.from_documents({"a": ["x", "y"]})
    assert one.fingerprint == Corpus.from_documents({"a": ["x", "y"]}).fingerprint
    others = [{"a": ["xy"]}, {"b": ["x", "y"]}, {"a": ["y", "x"]}, {"a": ["x"], "b": ["y"]}]
    prints = {Corpus.from_documents(documents).fingerprint for documents in others}
    assert len(prints | {one.fingerprint}) == 5


def test_merge_splits_anew() -> None:
    documents = [prose(seed) for seed in range(60)]
    first = Corpus.from_documents({"a": documents}, notes=["first"])
    second = Corpus.from_documents({"b": [*first.domains[0].held_out, *map(prose, range(90, 150))]})
    merged = merge([first, second])
    trained = {text for domain in merged.domains for text in domain.train}
    assert merged.notes[0] == "first"
    assert not any(text in trained for domain in merged.domains for text in domain.held_out)
    assert merge([first]) is first


def test_packed_files_and_tables_in_a_folder(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    root = tmp_path / "mine"
    root.mkdir()
    (root / "a.txt.gz").write_bytes(gzip.compress(b"packed text"))
    (root / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed line", "domain": "law"}\n'))
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a row"}]), root / "c.parquet")
    assert texts(load_corpus([root])) == {"law": "packed line", "mine": "a rowpacked text"}
    assert [d.name for d in load_corpus([root / "a.txt.gz"]).domains] == ["a"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text": "one"}, {"text": "two"}]', ("one", "two")),
        ('{"text": "one"}\n{"text": "two"}\n', ("one", "two")),
        ('{"name": "settings",\n "text": "x"}', ('{"name": "settings",\n "text": "x"}',)),
        ('[{"id": 1}]', ('[{"id": 1}]',)),
        ('{"messages": {"hello": "hallo"}}', ('{"messages": {"hello": "hallo"}}',)),
        ("[1, 2", ("[1, 2",)),
    ],
)
def test_json_files_are_records_where_these_have_a_text(
    content: str, expected: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(content)
    assert load_corpus([tmp_path / "a.json"]).domains[0].train == expected


@pytest.mark.parametrize("name", ["talks.jsonl", "talks.json"])
@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"messages": []}, "chat messages"),
        ({"conversations": []}, "ShareGPT"),
        ({"instruction": "a", "output": "b"}, "Alpaca"),
    ],
)
def test_conversations_are_named_as_such(name: str, record: Any, form: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=rf"row 1: no text; .*looks like {form}, for `etr sft`"):
        load_corpus([tmp_path / name])


def test_files_left_out_are_counted_and_named(folder: Path) -> None:
    for name in ("a.bin", "b.csv", "c.zst", "d.tar.gz"):
        (folder / name).write_bytes(b"\xff\x00")
    (folder / "wiki" / "empty.txt").write_text(" \n")
    said = (
        f"{folder}: files left out: 5 of another kind (a.bin, b.csv, c.zst, ...), "
        "1 without text (wiki/empty.txt)"
    )
    with pytest.warns(UserWarning, match="files left out") as warned:
        corpus = load_corpus([folder])
    assert [str(entry.message) for entry in warned] == [said]
    assert said in corpus.notes
    assert sorted(texts(corpus)) == ["code", "mine", "wiki"]


def test_a_folder_read_whole_says_nothing(folder: Path) -> None:
    (folder / "code" / "skip.bin").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any("left out" in note for note in load_corpus([folder]).notes)


@pytest.mark.parametrize("content", ["", " \n", '{"text": " "}\n'])
def test_a_named_file_without_text_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"b\.jsonl holds no text"):
        load_corpus([tmp_path / "a.txt", tmp_path / "b.jsonl"])
