"""Run the tests of all methods, and write down which passed, on which files.

python tools/criteria.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("--measured", "--timeout=3600", "-p", "no:xdist")


class Outcomes:
    """Collects what became of each test file: passed if its tests did, a criterion among them."""

    def __init__(self) -> None:
        self.criteria: dict[str, int] = {}
        self.failed: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            if item.get_closest_marker("criterion"):
                self.criteria[item.path.stem] = self.criteria.get(item.path.stem, 0) + 1

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self.failed.add(Path(report.nodeid.partition("::")[0]).stem)

    def passed(self, method: str) -> bool:
        file = f"test_{method}"
        return file in self.criteria and file not in self.failed


def main() -> int:
    from etr.files import write_json
    from etr.methods import METHODS
    from etr.report.criteria import RECORD, record_of

    outcomes = Outcomes()
    code = pytest.main([str(ROOT / "tests/methods"), *OPTIONS], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    passed = {name: outcomes.passed(name) for name in METHODS}
    write_json(ROOT / RECORD, record_of(ROOT, passed))
    print(f"written: {RECORD}; works: {sum(passed.values())} of {len(passed)}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
