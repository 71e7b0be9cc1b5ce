"""Run the tests of methods, and write down which passed, on which files.

python tools/criteria.py [METHOD ...]    all methods where none is named; others keep what they have
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
    from etr.files import read_json, write_json
    from etr.methods import METHODS
    from etr.report.criteria import RECORD, record_of

    names = sys.argv[1:] or list(METHODS)
    files = [str(ROOT / f"tests/methods/test_{name}.py") for name in names]
    outcomes = Outcomes()
    code = pytest.main([*files, *OPTIONS], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    record = record_of(ROOT, {name: outcomes.passed(name) for name in names})
    kept = read_json(ROOT / RECORD)["methods"] if (ROOT / RECORD).is_file() else {}
    found = {**kept, **record["methods"]}
    record["methods"] = {name: found[name] for name in METHODS if name in found}
    write_json(ROOT / RECORD, record)
    passed = [name for name in names if outcomes.passed(name)]
    print(f"written: {RECORD}; works: {len(passed)} of {len(names)} that ran")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
