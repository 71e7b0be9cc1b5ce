"""Run cases one after another; each is stored when done, so that a stopped run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.budget import too_long
from benchmarks.cases import Case
from benchmarks.measures import MEASURES
from benchmarks.results import CaseResult
from benchmarks.settings import Settings, load_average
from etr.files import write_json

OnCase = Callable[[Case, CaseResult, bool], None]
OnNote = Callable[[Case, str], None]


def run_cases(
    cases: Sequence[Case],
    settings: Settings,
    out: Path,
    *,
    again: bool = False,
    on_note: OnNote = lambda case, note: None,
    on_case: OnCase = lambda case, result, stored: None,
) -> list[CaseResult]:
    """Measure cases, or read those that are stored and still hold.

    Args:
        cases: which.
        settings: the same for all.
        out: folder; each case goes to ``cases/`` in it.
        again: measure stored cases too.
        on_note: told about progress inside a case.
        on_case: told about each finished case, and whether it was stored.
    """
    results = []
    for case in cases:
        path = out / "cases" / f"{case.slug}.json"
        key = {"case": case.sizes(), **settings.fingerprint()}
        if case.group == "training":
            key["against"] = settings.against
        stored = None if again else read_stored(path, key)
        result = stored or measure(case, settings, on_note)
        if stored is None:
            write_json(path, {"key": key, "result": result.to_dict()})
        results.append(result)
        on_case(case, result, stored is not None)
    return results


def measure(case: Case, settings: Settings, on_note: OnNote) -> CaseResult:
    """One case."""
    began = time.perf_counter()
    left_out = "" if settings.quick else too_long(case, settings.device)
    run = MEASURES[case.group]
    rows = [] if left_out else run(case, settings, lambda note: on_note(case, note))
    return CaseResult(
        name=case.name,
        group=case.group,
        sizes=case.sizes(),
        rows=rows,
        took_seconds=time.perf_counter() - began,
        left_out=left_out,
    )


def read_stored(path: Path, key: dict[str, Any]) -> CaseResult | None:
    """A stored case if it was measured on the same sources, machine and settings."""
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    return CaseResult.from_dict(values["result"]) if values["key"] == key else None


def write_results(
    out: Path, settings: Settings, results: list[CaseResult], load: float | None
) -> dict[str, Any]:
    """Write ``speed.json``: the environment and all cases.

    Args:
        load: load average before the run.
    """
    environment = {
        **settings.describe(),
        "load average": [load, load_average()],
        "measured seconds": round(sum(result.took_seconds for result in results), 1),
    }
    found = {
        "format": 2,
        "environment": environment,
        "cases": [result.to_dict() for result in results],
    }
    write_json(out / "speed.json", found)
    return found
