"""A list of a folder's files with their checksums, written last: what it names is complete."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from etr.files import read_json, sha256_of_file
from etr.parallel.ranks import Ranks

NAME = "manifest.json"
Files = dict[str, dict[str, Any]]
"""Size in bytes and SHA-256 of files, by relative path."""


def describe_files(folder: Path, ranks: Ranks) -> Files:
    """Every file of a folder but the manifest; all of them are on the disk then.

    Ranks share the work; a file that another rank has written but that this one cannot see is an
    error, since then the folder is not shared by all machines.
    """
    names = ranks.from_first([name for name in _files_in(folder) if name != NAME])
    return _shared(names, lambda name: _describe(folder / name), ranks)


def read_manifest(folder: Path) -> Files:
    """The files that a folder's manifest lists.

    Raises:
        ValueError: there is no manifest, or it is malformed.
    """
    try:
        files = read_json(folder / NAME)
    except (OSError, ValueError) as error:
        raise ValueError(f"{NAME} cannot be read: {error}") from error
    if not isinstance(files, dict) or not files or not all(map(_is_entry, files, files.values())):
        raise ValueError(f"{NAME} is not a list of files with their sizes and checksums")
    return files


def find_damage(folder: Path, ranks: Ranks, required: Sequence[tuple[str, ...]] = ()) -> str | None:
    """What is wrong with the files that a folder's manifest lists; None where nothing is.

    The same on every rank.

    Args:
        folder: holds the manifest.
        ranks: all of them call this, and share the work.
        required: of each tuple of patterns, one must match a listed file.
    """
    files: Files = {}
    problem: str | None = None
    if ranks.is_first:
        try:
            files = read_manifest(folder)
            problem = _lacking(list(files), required)
        except ValueError as error:
            problem = str(error)
    files, problem = ranks.from_first((files, problem))
    if problem:
        return problem
    problems = _shared(sorted(files), lambda name: _problem(folder / name, files[name]), ranks)
    return "; ".join(f"{name} {text}" for name, text in problems.items() if text) or None


def unlisted(folder: Path) -> list[str]:
    """Files of a folder that its manifest does not list, hidden ones apart."""
    listed = {NAME, *read_manifest(folder)}
    return [
        name
        for name in _files_in(folder)
        if name not in listed and not any(part.startswith(".") for part in name.split("/"))
    ]


def _files_in(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _is_entry(name: str, entry: Any) -> bool:
    """Whether it is a file inside the folder, with size and checksum."""
    path = PurePosixPath(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return (
        inside
        and "\\" not in name
        and isinstance(entry, dict)
        and entry.keys() == {"bytes", "sha256"}
        and type(entry["bytes"]) is int
        and isinstance(entry["sha256"], str)
    )


def _lacking(names: list[str], required: Sequence[tuple[str, ...]]) -> str | None:
    for patterns in required:
        if not any(fnmatch.filter(names, pattern) for pattern in patterns):
            return f"{NAME} lists no {' or '.join(patterns)}"
    return None


def _shared(names: list[str], work: Callable[[str], Any], ranks: Ranks) -> dict[str, Any]:
    """``work(name)`` for every name, each done by one rank and known to all."""
    parts = ranks.gather({name: work(name) for name in names[ranks.rank :: ranks.size]})
    return {name: value for part in parts for name, value in part.items()}


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def _problem(path: Path, wanted: dict[str, Any]) -> str | None:
    try:
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != wanted["bytes"]:
            return f"has {size} of {wanted['bytes']} bytes"
        return None if sha256_of_file(path) == wanted["sha256"] else "has another checksum"
    except OSError as error:
        return f"cannot be read: {error}"
