"""A kill in each phase of a save leaves a run that goes on as if undisturbed.

Phases end with a rename. ``python -m benchmarks.faults`` kills at every operation on files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from parallel_runs import write_corpus

from benchmarks.faults_saves import WAYS, kill_at_every_operation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless"),
]


@pytest.mark.parametrize(("way", "renames"), [*zip(WAYS, (4, 5, 3), strict=True)])
def test_a_kill_in_every_phase_of_a_save(tmp_path: Path, way: str, renames: int) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    renaming = frozenset({"os.rename"})
    found = kill_at_every_operation(tmp_path / "kills", corpus, way, renaming)
    assert found.number == renames
    assert (found.resumed, found.equal, found.left) == (renames, renames, 0)
