"""One reader for every command: encodings, .gz, JSON lines and arrays, Parquet, clear errors."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from etr.data import load_corpus, reading
from etr.data.conversations import read_conversations
from etr.data.reading import read_rows, read_text, suffix_of
from etr.evaluate.tasks.base import read_lines

RECORD = {"text": "héllo 😀", "prompt": "a", "completion": "b", "question": "q", "answer": "z"}
ENCODINGS = {
    "UTF-8": ("utf-8", b""),
    "UTF-8 with a mark": ("utf-8", codecs.BOM_UTF8),
    "UTF-16 LE": ("utf-16-le", codecs.BOM_UTF16_LE),
    "UTF-16 BE": ("utf-16-be", codecs.BOM_UTF16_BE),
    "UTF-32 LE": ("utf-32-le", codecs.BOM_UTF32_LE),
    "UTF-32 BE": ("utf-32-be", codecs.BOM_UTF32_BE),
}
COMMANDS: dict[str, Callable[[Path], str]] = {
    "train": lambda path: load_corpus([path]).domains[0].train[0],
    "sft": lambda path: read_conversations(path)[0][1].content,
    "evaluate": lambda path: read_lines(path, {"question": str})[0]["answer"],
}
SEEN = {"train": "héllo 😀", "sft": "b", "evaluate": "z"}


def as_lines(path: Path) -> None:
    path.write_text(json.dumps(RECORD, ensure_ascii=False) + "\r\n\r\n", encoding="utf-8")


def as_array(path: Path) -> None:
    path.write_text(json.dumps([RECORD, RECORD], indent=1), encoding="utf-8")


def as_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(json.dumps(RECORD).encode()))


def as_parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([RECORD, RECORD]), path)


SHAPES: dict[str, Callable[[Path], None]] = {
    "a.jsonl": as_lines,
    "lines.json": as_lines,
    "array.json": as_array,
    "array.jsonl": as_array,
    "a.jsonl.gz": as_gzip,
    "a.JSON.GZ": as_gzip,
    "a.parquet": as_parquet,
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_reads_every_encoding(command: str, encoding: str, tmp_path: Path) -> None:
    name, mark = ENCODINGS[encoding]
    path = tmp_path / "a.jsonl"
    path.write_bytes(mark + (json.dumps(RECORD, ensure_ascii=False) + "\r\n").encode(name))
    assert COMMANDS[command](path) == SEEN[command]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_command_reads_every_kind_of_file(command: str, name: str, tmp_path: Path) -> None:
    SHAPES[name](tmp_path / name)
    assert COMMANDS[command](tmp_path / name) == SEEN[command]


def test_a_record_says_where_it_stands(tmp_path: Path) -> None:
    places = {}
    for name, write in SHAPES.items():
        write(tmp_path / name)
        places[name] = [where for where, _ in read_rows(tmp_path / name)]
    assert places["a.jsonl"] == [f"{tmp_path / 'a.jsonl'}, line 1"]
    for name in ("array.json", "a.parquet"):
        assert places[name] == [f"{tmp_path / name}, row {n}" for n in (1, 2)]


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    """Not U+2028 and others, which may stand in a JSON text as they are."""
    value = {"question": "a\u2028b\x85c\u2029d", "n": 1}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_lines(path, {"question": str}) == [value]


def test_suffixes_are_those_before_gz() -> None:
    names = {"a.txt.gz": ".txt", "a.JSONL.GZ": ".jsonl", "a.tar.gz": ".tar", "a.gz": "", "a": ""}
    assert {name: suffix_of(Path(name)) for name in names} == names


def cut_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b"text " * 1000)[:-20])


def no_gzip(path: Path) -> None:
    path.write_bytes(b"text")


def flipped_gzip(path: Path) -> None:
    data = bytearray(gzip.compress(bytes(range(256)) * 9))
    data[-6] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut_gzip, no_gzip, flipped_gzip])
def test_a_damaged_gzip_is_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(tmp_path / "a.txt.gz")
    with pytest.raises(ValueError, match=r"a\.txt\.gz: damaged, or not gzip \("):
        read_text(tmp_path / "a.txt.gz")


def test_a_gzip_that_becomes_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(bytes(1_000_000)))
    assert len(read_text(path)) == 1_000_000, "small ones may become anything"
    monkeypatch.setattr(reading, "_SMALL", 1000)
    limit = 200 * path.stat().st_size
    with pytest.raises(ValueError, match=rf"a\.txt\.gz: becomes more than {limit} bytes"):
        read_text(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not UTF-8 text .*'utf-8'"),
        (codecs.BOM_UTF16_LE + b"a", "line 1: not UTF-16 text"),
        (b'{"a": 1}\n\n{"a"\n', "line 3: not JSON .*one object a line, or one array"),
        (b'[{"a": 1},\n{"a"}]', r"a\.jsonl: not JSON"),
        (b"[" * 100_000, r"a\.jsonl: not JSON .*recursion"),
        (b'{"a": 1}\n{"a": "\\uD800"}\n', "line 2: holds a lone surrogate"),
        (b'[{"a": "\\udc00x"}]', "holds a lone surrogate"),
    ],
)
def test_what_cannot_be_read_is_named(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=rf"a\.jsonl.*{reason}|{reason}") as error:
        list(read_rows(tmp_path / "a.jsonl"))
    assert "a.jsonl" in str(error.value)


def test_pairs_of_surrogates_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "\\ud83d\\ude00"}')
    assert [value for _, value in read_rows(tmp_path / "a.jsonl")] == [{"a": "😀"}]


@pytest.mark.parametrize("size", [0, 4, 50, -30])
def test_a_damaged_parquet_file_is_named(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    as_parquet(path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"a\.parquet: damaged after row 0, or not Parquet"):
        list(read_rows(path))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="needs the package pyarrow: pip install"):
        list(read_rows(tmp_path / "a.parquet"))


def test_columns_without_a_value_are_none(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows: list[dict[str, Any]] = [{"text": "a", "domain": None}, {"text": "b", "domain": "law"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [d.name for d in load_corpus([tmp_path / "a.parquet"]).domains] == ["a", "law"]
