"""One way to read text and records from files, for every command.

A text is decoded by its byte order mark, UTF-8 without one; `.gz` is unpacked. Records come from
JSON lines, a JSON array or Parquet, each with the words that say where it stands.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Record = tuple[str, Any]
"""Where a record stands, e.g. "talks.jsonl, line 3", and its value."""

MAX_EXPANSION = 200
"""Most bytes that one byte of a .gz file may become; text seldom exceeds 20."""
_SMALL = 1 << 30  # bytes that any .gz file may become

_MARKS = {  # UTF-32's first: the shorter one is its beginning
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)


def suffix_of(file: Path) -> str:
    """The suffix that says what a file holds, in lower case, without a .gz after it."""
    suffix = file.suffix.lower()
    return file.with_suffix("").suffix.lower() if suffix == ".gz" else suffix


def read_text(file: Path) -> str:
    """A file's text, without a byte order mark, with single newlines.

    Raises:
        ValueError: the file is not UTF-8 (nor UTF-16 or UTF-32 with a mark), or a damaged .gz.
    """
    data = _read_bytes(file)
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(f"{file}, line {line}: not {name} text ({error})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_rows(file: Path) -> Iterator[Record]:
    """A file's records: those of Parquet by its suffix, else JSON lines or one JSON array.

    Raises:
        ValueError: as `read_text`, a record that is not JSON, a damaged Parquet file, or no
            package that reads one.
    """
    return READERS.get(suffix_of(file), _json_rows)(file)


def _read_bytes(file: Path) -> bytes:
    if file.suffix.lower() != ".gz":
        return file.read_bytes()
    limit = max(_SMALL, MAX_EXPANSION * file.stat().st_size)
    try:
        with gzip.open(file) as opened:
            data = opened.read(limit + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: damaged, or not gzip ({error})") from error
    if len(data) > limit:
        raise ValueError(f"{file}: becomes more than {limit} bytes; unpack it to read it anyway")
    return data


def _json_rows(file: Path) -> Iterator[Record]:
    text = read_text(file)
    if text.lstrip().startswith("["):
        values = _parse(text, str(file))
        yield from ((f"{file}, row {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in enumerate(io.StringIO(text, newline="\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, _parse(line, where)


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: holds a lone surrogate, which is not text ({error})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: not JSON ({error}); write one object a line, or one array of objects"
        ) from error
    return value


def _parquet_rows(file: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ValueError(f"{file}: needs the package pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with ParquetFile(file) as opened:
            for batch in opened.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", value
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: damaged after row {number}, or not Parquet ({error})") from error


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".parquet": _parquet_rows,
}
"""From the suffix of files that hold records, and nothing else, to their reader."""
