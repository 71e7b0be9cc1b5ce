"""What became of each test, held against the table of tests that do not apply."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("inapplicable.toml")
LONGEST = 200
"""Characters of a message that a page shows."""
KEYS = {"tests", "bases", "whole", "reason"}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the table.

    Args:
        tests: name of a test, or a pattern.
        bases: where it does not apply; empty means everywhere.
        whole: it exists in a checkout alone.
        reason: why it does not apply, a full sentence.
    """

    tests: str
    reason: str
    bases: tuple[str, ...] = ()
    whole: bool = False

    def covers(self, base: str, test: str) -> bool:
        return (not self.bases or base in self.bases) and fnmatchcase(test, self.tests)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result of one test: passed, failed or skipped, and the message of the latter two."""

    base: str
    test: str
    result: str
    message: str = ""


@dataclass(kw_only=True)
class Verdict:
    """What is known of one base."""

    passed: list[Outcome] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)
    inapplicable: list[tuple[Outcome, Entry]] = field(default_factory=list)
    skipped: list[Outcome] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.failed or self.stale)


def read_table(path: Path = TABLE) -> list[Entry]:
    """The rows of a table.

    Raises:
        ValueError: a row has another key than `Entry`, or lacks the test or the reason.
    """
    entries = []
    for row in tomllib.loads(path.read_text(encoding="utf-8")).get("entry", []):
        if set(row) - KEYS or not row.get("tests") or not row.get("reason"):
            raise ValueError(
                f"{path.name}: {row} needs tests and reason, and may have bases, whole"
            )
        entries.append(Entry(**{**row, "bases": tuple(row.get("bases", ()))}))
    return entries


def judge(base: str, outcomes: Iterable[Outcome], table: Iterable[Entry], whole: bool) -> Verdict:
    """One base's outcomes against the table.

    A test that fails is a failure unless a row covers it. A row is stale where what it covers
    passes, skips itself, or is not there.
    """
    verdict = Verdict()
    mine = [outcome for outcome in outcomes if outcome.base == base]
    rows = [
        row for row in table if (whole or not row.whole) and (not row.bases or base in row.bases)
    ]
    for outcome in mine:
        row = next((row for row in rows if row.covers(base, outcome.test)), None)
        if outcome.result == "failed" and row is not None:
            verdict.inapplicable.append((outcome, row))
        else:
            getattr(verdict, outcome.result).append(outcome)
    for row in rows:
        found = [outcome for outcome in mine if row.covers(base, outcome.test)]
        if not found:
            verdict.stale.append(f"{row.tests}: there is no such test")
        verdict.stale += [
            f"{outcome.test}: {outcome.result}" for outcome in found if outcome.result != "failed"
        ]
    return verdict


class Recorder:
    """A pytest plugin that keeps the outcome of every test of `model_tests`."""

    def __init__(self) -> None:
        self.reports: dict[tuple[str, str], list[Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        _, base, test = report.nodeid.split("::")
        self.reports.setdefault((base, test), []).append(report)

    def outcomes(self) -> list[Outcome]:
        return [
            Outcome(base=base, test=test, **_result(reports))
            for (base, test), reports in self.reports.items()
        ]


def _result(reports: list[Any]) -> dict[str, str]:
    """Of the reports on a test's phases and subtests, what counts."""
    failed = [report for report in reports if report.failed]
    if failed:
        crash = getattr(failed[0].longrepr, "reprcrash", None)
        return {"result": "failed", "message": _first_line(getattr(crash, "message", ""))}
    skipped = [report for report in reports if report.skipped]
    # A test all of whose subtests skip has shown nothing, though it ends well.
    parts = [report for report in reports if hasattr(report, "context")]
    if skipped and not any(part.passed for part in parts):
        reason = str(skipped[0].longrepr[2]).removeprefix("Skipped: ")
        return {"result": "skipped", "message": _first_line(reason)}
    return {"result": "passed"}


def _first_line(text: str) -> str:
    line = next(iter(text.strip().splitlines()), "")
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."
