"""Damaged files of every kind: errors of one line, no hang, no other weights, no code run.

``python -m benchmarks.faults`` tries twice as many and writes the counts into docs/reliability.md.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fuzz
from benchmarks.fuzz import BAD, Kind, OtherWeights, table
from benchmarks.fuzz_kinds import KINDS
from benchmarks.fuzz_mutations import damage_bytes

CASES = 60


def test_enough_is_tried() -> None:
    assert CASES * len(KINDS) >= 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_named_or_changes_nothing(tmp_path: Path, name: str) -> None:
    found = fuzz.fuzz(KINDS[name], tmp_path / "kind", CASES)
    assert found.examples == []
    assert sum(found.outcomes.values()) == CASES
    assert found.outcomes["the same"] < CASES  # the damage is seen


def hang(folder: Path) -> None:
    if not (folder / "file").read_bytes().startswith(b"whole"):
        time.sleep(60)


def raises(error: BaseException) -> Any:
    def read(folder: Path) -> str:
        if not (folder / "file").read_bytes().startswith(b"whole"):
            raise error
        return ""

    return read


def run_code(folder: Path) -> None:
    if not (folder / "file").read_bytes().startswith(b"whole"):
        (folder / "ran").touch()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {"a": torch.tensor(list((folder / "file").read_bytes()[:1] or b"x"))}


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (raises(ValueError("it is damaged")), "one line"),
        (raises(FileNotFoundError("it is not there")), "one line"),
        (raises(TypeError("not a number")), "traceback"),
        (raises(SystemExit(3)), "traceback"),
        (raises(OtherWeights("step 2")), "other weights"),
        (weights, "other weights"),
        (lambda folder: None, "the same"),
        (hang, "hang"),
        (run_code, "code run"),
    ],
)
def test_the_fuzzer_sees_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any, outcome: str
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "file").write_text("whole")

    def damage(content: bytes, stream: random.Random) -> bytes:
        return b"damaged"

    kind = Kind("kind", "file", damage, read, make, True)
    found = fuzz.fuzz(kind, tmp_path / "kind", 2)
    assert found.outcomes == {outcome: 2}
    assert bool(found.examples) == (outcome in BAD)
    assert (tmp_path / "kind" / "file").read_text() == "whole"
    assert "| kind | 2 |" in table([found])


def test_a_case_is_the_same_every_time() -> None:
    content = bytes(range(100))
    once, again = ([damage_bytes(content, random.Random(n)) for n in range(50)] for _ in range(2))
    assert once == again
    assert len(set(once)) > 30
