"""A list of a folder's files with their checksums, written last: what it names is complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etr.parallel.ranks import Ranks

NAME = "manifest.json"


def describe_files(folder: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file of a folder but the manifest, by relative path.

    Ranks share the work; a file that another rank has written but that this one cannot see is an
    error, since then the folder is not shared by all machines.
    """
    names = ranks.from_first(
        sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and path.name != NAME
        )
    )
    return _shared(names, lambda name: _describe(folder / name), ranks)


def find_damage(folder: Path, ranks: Ranks) -> str | None:
    """What is wrong with the files that a folder's manifest names; None where nothing is.

    The same on every rank.
    """
    unreadable: str | None = None
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / NAME).read_text())
    except (OSError, ValueError) as error:
        files, unreadable = {}, f"{NAME} cannot be read: {error}"
    found = [text for text in ranks.gather(unreadable) if text]
    if found:
        return found[0]
    problems = _shared(sorted(files), lambda name: _problem(folder / name, files[name]), ranks)
    return "; ".join(f"{name} {text}" for name, text in problems.items() if text) or None


def _shared(names: list[str], work: Callable[[str], Any], ranks: Ranks) -> dict[str, Any]:
    """``work(name)`` for every name, each done by one rank and known to all."""
    parts = ranks.gather({name: work(name) for name in names[ranks.rank :: ranks.size]})
    return {name: value for part in parts for name, value in part.items()}


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _problem(path: Path, wanted: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != wanted["bytes"]:
        return f"has {size} of {wanted['bytes']} bytes"
    return None if _describe(path) == wanted else "has another checksum"
