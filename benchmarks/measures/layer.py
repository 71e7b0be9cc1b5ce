"""Every system on the whole layer: checked, then timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable

import torch

from benchmarks.cases import Case
from benchmarks.check import Reference, check
from benchmarks.measures.steps import OnNote, reason_of, run_rounds, step_of
from benchmarks.memory import saved_bytes
from benchmarks.results import Row
from benchmarks.rounds import Seconds
from benchmarks.settings import Settings
from benchmarks.systems import SYSTEMS, Built, Problem, System, make_problem
from benchmarks.systems.floors import DENSE
from tools.operations import operations

CHECKED_TOKENS = 256
"""Values and gradients are compared on the first tokens of the case."""
BACKWARD_COST = 3.0
"""A step is expected to take this many forwards, to plan the rounds."""
GROWTH_RIVALS = (DENSE, "transformers grouped_mm")


def measure_layer(case: Case, settings: Settings, on_note: OnNote) -> list[Row]:
    """Rows of all systems."""
    return measure_systems(case, settings, on_note, SYSTEMS.values())


def measure_growth(case: Case, settings: Settings, on_note: OnNote) -> list[Row]:
    """Rows of our backends and a few others, for slopes over sizes."""
    wanted = [s for s in SYSTEMS.values() if s.kind == "ours" or s.name in GROWTH_RIVALS]
    return measure_systems(case, settings, on_note, wanted)


def measure_systems(
    case: Case, settings: Settings, on_note: OnNote, systems: Iterable[System]
) -> list[Row]:
    """Check each system on this case, read its routing and saved bytes, time those that pass."""
    problem = make_problem(case, settings.device)
    count = min(CHECKED_TOKENS, case.num_tokens)
    x, upstream = problem.x[:count], problem.upstream[:count]
    reference = Reference(x, upstream, problem.up, problem.down)
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[], Seconds]] = {}
    expected: Seconds = {}
    for system in systems:
        on_note(f"checking {system.name}")
        row = Row(system=system.name, kind=system.kind, version=system.version)
        reason = system.missing(settings.device) or system.refuses(case)
        if not reason:
            try:
                built = system.build(problem)
                row, reason = checked(row, built, problem, reference)
                if not reason:
                    row, seconds = traced(row, built, problem)
                    steps[system.name] = step_of(built, problem.x, problem.upstream)
                    expected[system.name] = BACKWARD_COST * seconds
            except Exception as error:  # whatever a foreign package raises is its row's reason
                reason = reason_of(error)
                steps.pop(system.name, None)
        rows[system.name] = dataclasses.replace(row, refused=reason)
    found = run_rounds(steps, case.budget, on_note, {name: expected[name] for name in steps})
    return [dataclasses.replace(row, seconds=found.get(name, {})) for name, row in rows.items()]


def checked(row: Row, built: Built, problem: Problem, reference: Reference) -> tuple[Row, str]:
    """The row with what kind of routing it has, and why it may not be timed, or empty."""
    if row.kind == "floor":
        return row, ""
    if built.traced is None:
        return row, "its routing cannot be read, so it cannot be checked"
    count = len(reference.x)
    wrong = check(built, problem.x[:count], problem.upstream[:count], reference)
    return row, f"failed its check: {wrong}" if wrong else ""


def traced(row: Row, built: Built, problem: Problem) -> tuple[Row, float]:
    """Kept pairs and saved bytes of one full forward, and its seconds."""
    asked = problem.case.num_tokens * problem.case.top_k
    leaves = [*built.leaves, problem.up, problem.down, problem.gate]
    inputs, _ = built.inputs or ([problem.x], [])
    inputs = [t.detach().requires_grad_() for t in inputs]
    call = built.call if built.traced is None else built.traced
    began = time.perf_counter()
    result, saved = saved_bytes(lambda: call(*inputs), leaves)
    seconds = time.perf_counter() - began
    weight = problem.weight if built.traced is None else result[1].detach()
    kept = int((weight != 0).sum())
    same = kept == asked and torch.allclose(
        weight.float(), problem.weight, rtol=1e-2, atol=1e-2 / problem.case.top_k
    )
    return dataclasses.replace(
        row,
        default=built.default,
        kept_pairs=kept,
        drop_rate=1 - kept / asked,
        saved_bytes=saved,
        operations=count_operations(built, problem),
        routing="same" if same else "own",
    ), seconds


def count_operations(built: Built, problem: Problem) -> int:
    """Operations that are not views of one step, forward and backward."""
    return len(operations(step_of(built, problem.x, problem.upstream)))
