"""Files and folders that appear whole or not at all, checksums, and lines of JSON.

The one place from which the project writes. What is being written has a temporary name that no
other process uses, beside its place, so that a rename puts it there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEFT_BEHIND_SECONDS = 24 * 3600.0
"""Age from which a temporary name is taken for that of a process that was killed."""
ASIDE = ".old-"
"""Before the name of a folder while another takes its place."""


def sha256(*parts: bytes | str) -> str:
    """Hex SHA-256 of the parts, each with its length, so that moving a boundary changes it."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, values: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(values, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; its folder is made."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file's path to write to; it gets its name when the block ends without error.

    Args:
        path: its name then; its folder is made, and an old file replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _forget_the_dead(path)
    temporary = temporary_sibling(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """An empty temporary folder to fill; it gets its name when the block ends without error.

    Args:
        path: its name then; the folder around it is made.
        replace: put it in the place of a folder that is there, see `put_folder`.
    Raises:
        OSError: there is a folder with files in it, and it is not to be replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _forget_the_dead(path)
    temporary = temporary_sibling(path)
    try:
        temporary.mkdir()
        yield temporary
        if replace:
            put_folder(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_folder(new: Path, path: Path) -> None:
    """Rename a folder to `path`; what is there keeps the name `set_aside` until it is removed.

    Between the two renames there is nothing at `path`: who was killed there calls `put_back` when
    it starts again.
    """
    if not path.exists():
        os.replace(new, path)
        return
    old = set_aside(path)
    shutil.rmtree(old, ignore_errors=True)
    os.replace(path, old)
    try:
        os.replace(new, path)
    finally:
        put_back(path)


def set_aside(path: Path) -> Path:
    """Name of a folder while another takes its place."""
    return path.with_name(f"{ASIDE}{path.name}")


def put_back(path: Path) -> None:
    """Undo, or finish, a `put_folder` that was killed; nobody else may be writing there."""
    old = set_aside(path)
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder; it is gone, or there as it was, but never in part."""
    with contextlib.suppress(OSError):
        temporary = temporary_sibling(path)
        os.replace(path, temporary)
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_sibling(path: Path) -> Path:
    """A hidden name beside `path` that no other process uses."""
    return path.with_name(f".tmp-{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def remove_temporaries(folder: Path, *, name: str = ".*", older_than_seconds: float = 0.0) -> None:
    """Remove what killed processes left in a folder; nobody may be writing there now.

    Args:
        folder: need not exist.
        name: pattern of what was to be written.
        older_than_seconds: age of what is removed.
    """
    pattern = re.compile(rf"\.tmp-(?:{name})(?:\.\d+-[0-9a-f]{{8}})?", re.DOTALL)
    with contextlib.suppress(OSError):  # what cannot be removed is in nobody's way
        for path in folder.iterdir():
            if pattern.fullmatch(path.name):
                if time.time() - path.stat().st_mtime < older_than_seconds:
                    continue
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _forget_the_dead(path: Path) -> None:
    remove_temporaries(
        path.parent, name=re.escape(path.name), older_than_seconds=LEFT_BEHIND_SECONDS
    )


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON in UTF-8; names the file and what is wrong.
    """
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a JSON object; names the file and what is wrong.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(found).__name__}")
    return found


def find_object(path: Path) -> dict[str, Any] | None:
    """The JSON object that a file holds; None where there is none that can be read."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return None


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        ValueError: it is not JSON; the message completes a sentence that begins with its name.
    """
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"is not a text file in UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"is not complete JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from error
    except RecursionError:
        raise ValueError("is JSON that is nested too deeply") from None
    except ValueError as error:  # a number of too many digits
        raise ValueError(f"is JSON that cannot be read: {error}") from error


@dataclass(frozen=True, kw_only=True)
class JsonLine:
    """A line that is not blank, of a file that should hold one JSON object a line."""

    number: int
    """Number of the line, from 1."""
    raw: bytes
    """Its bytes, without the newline."""
    row: dict[str, Any] | None
    """The object; None where the line does not hold one."""
    ended: bool = True
    """Whether a newline follows, so that the line was written whole."""

    @property
    def is_cut(self) -> bool:
        """Whether it is the beginning of an object, whose writer was killed."""
        return not self.ended and self.row is None and self.raw.startswith(b"{")


def json_lines(content: bytes) -> list[JsonLine]:
    """The lines of a file that should hold one JSON object a line, whatever they hold."""
    parts = content.split(b"\n")
    return [
        JsonLine(number=number, raw=raw, row=parse_row(raw), ended=number < len(parts))
        for number, raw in enumerate(parts, start=1)
        if raw.strip()
    ]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The JSON object on a line; None where there is none."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
