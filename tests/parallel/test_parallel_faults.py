"""Runs under torchrun whose ranks and nodes die, raise or hang."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_torchrun import ForkedAgent

from benchmarks import faults
from benchmarks.faults import (
    END,
    PAGE,
    Outcome,
    killed,
    spoiled,
    start_torchrun,
    table,
    undisturbed,
)
from benchmarks.faults_worker import MESSAGE

STEPS, KILL_AFTER = 14, 7

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Shorter runs than those of the page."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(faults, "STEPS", STEPS)
        patched.setattr(faults, "KILL_AFTER", KILL_AFTER)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    outcome = undisturbed(tmp_path_factory.mktemp("faults") / "whole", ForkedAgent)
    assert outcome.exit_code == 0, outcome.output
    assert len(outcome.losses) == STEPS
    return outcome


@pytest.mark.parametrize("nodes", [1, 2], ids=["rank", "node"])
def test_a_killed_job_restarts_and_learns_the_same(
    tmp_path: Path, whole: Outcome, nodes: int
) -> None:
    outcome = killed(tmp_path / "job", nodes, ForkedAgent)
    assert outcome.exit_code == 0, outcome.output
    assert outcome.lost_steps > 0
    assert outcome.losses == whole.losses


@pytest.mark.parametrize(
    ("fault", "words"), [("raise", f"RuntimeError: {MESSAGE}"), ("hang", "imed out")]
)
def test_a_rank_at_fault_ends_the_job(tmp_path: Path, fault: str, words: str) -> None:
    # Of forked ranks torchrun prints one traceback, which may be that of the peer of one at fault.
    start = start_torchrun if fault == "raise" else ForkedAgent
    outcome = spoiled(tmp_path / "job", fault, start)
    assert outcome.exit_code != 0
    assert words in outcome.output
    assert len(outcome.losses) == 3


def test_the_page_has_a_row_for_each_fault(whole: Outcome) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert table(whole, []) in page
    assert page.index(END) > 0
