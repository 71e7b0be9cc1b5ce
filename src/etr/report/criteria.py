"""Whether the criterion of a method was met, and whether that was on today's code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import etr
from etr.files import read_json, sha256_of_file
from etr.methods import METHODS, Card

RECORD = "docs/results/criteria.json"
"""What `make criteria` writes, from the project's root."""
FORMAT = 1
WORKS, FAILS, CHANGED, NEVER = "works", "fails", "not run since it changed", "not run"


def project() -> Path | None:
    """Root of the checkout that this code runs from; None where it is installed elsewhere."""
    root = Path(etr.__file__).resolve().parents[2]
    return root if (root / "tests/methods").is_dir() else None


def digests(card: Card, root: Path) -> dict[str, str]:
    """SHA-256 of a method's file and of its test, by path.

    Args:
        root: of the project.
    """
    files = (f"src/etr/methods/{card.name}.py", f"tests/methods/test_{card.name}.py")
    return {name: sha256_of_file(root / name) for name in files}


def record_of(root: Path, passed: dict[str, bool]) -> dict[str, Any]:
    """What is written down after the tests of all methods ran.

    Args:
        root: of the project.
        passed: by method, whether all tests of its file passed, the criterion among them.
    """
    return {
        "format": FORMAT,
        "methods": {
            name: {"passed": passed[name], "sha256": digests(METHODS[name], root)}
            for name in METHODS
            if name in passed
        },
    }


def statuses() -> dict[str, str]:
    """Status of every method by name; "not run" where there is no record of it."""
    root = project()
    if root is None or not (root / RECORD).is_file():
        return dict.fromkeys(METHODS, NEVER)
    record = read_json(root / RECORD)["methods"]
    return {name: _status(card, record.get(name), root) for name, card in METHODS.items()}


def _status(card: Card, found: dict[str, Any] | None, root: Path) -> str:
    if found is None:
        return NEVER
    if found["sha256"] != digests(card, root):
        return CHANGED
    return WORKS if found["passed"] else FAILS
