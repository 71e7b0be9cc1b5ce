"""Damaged files of every kind that is read, and what reading them came to.

Each case damages one file, seeded by its number, and reads it as the verbs do: an error must be one
line, nothing may hang, weights must be those of the whole file or none, and no code of a folder
may run.
"""

from __future__ import annotations

import contextlib
import io
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from etr import sheet
from etr.cli._errors import in_one_line

SECONDS = 20
"""After so long a case hangs."""
MEMORY_BYTES = 8 << 30
"""Address space that a case may take beside what is in use."""
CASES = 120
"""Of each kind."""
GOOD = ("one line", "the same", "read otherwise")
BAD = ("traceback", "hang", "other weights", "code run")
Damage = Callable[[bytes, random.Random], bytes]
Read = Callable[[Path], Any]


class Late(BaseException):
    """A case takes too long."""


class OtherWeights(Exception):
    """A reader's weights are not those that were written."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Args:
        name: for the table.
        file: in the folder of the kind.
        damage: makes a damaged file of a whole one.
        read: reads the folder as the verbs do; gives weights by name, or what else was read.
        holds_weights: what is read is weights, which may not differ.
        make: writes the whole folder.
    """

    name: str
    file: str
    damage: Damage
    read: Read
    make: Callable[[Path], None]
    holds_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the cases of one kind came to.

    Args:
        name: of the kind.
        outcomes: number of cases by outcome, of `GOOD` and `BAD`.
        examples: bad cases: number, outcome, and what was seen, which is another in each.
    """

    name: str
    outcomes: Counter[str]
    examples: list[tuple[int, str, str]]


def fuzz(kind: Kind, folder: Path, cases: int = CASES) -> Found:
    """Try so many damaged files of a kind.

    Args:
        kind: of `benchmarks.fuzz_kinds.KINDS`.
        folder: new.
    """
    kind.make(folder)
    path = folder / kind.file
    whole = path.read_bytes()
    with contextlib.chdir(folder):
        expected = kind.read(folder)
    outcomes: Counter[str] = Counter()
    examples: list[tuple[int, str, str]] = []
    with contextlib.chdir(folder), _stdin_that_agrees():
        for number in range(cases):
            damaged = kind.damage(whole, random.Random(f"{kind.name} {number}"))
            if damaged == whole:
                damaged = whole[: len(whole) // 2]
            path.write_bytes(damaged)
            outcome, seen = _outcome(kind, folder, expected)
            outcomes[outcome] += 1
            if outcome in BAD and seen not in [known for *_, known in examples]:
                examples.append((number, outcome, seen))
            path.write_bytes(whole)
    return Found(name=kind.name, outcomes=outcomes, examples=examples)


def _outcome(kind: Kind, folder: Path, expected: Any) -> tuple[str, str]:
    """What one case came to, and what was seen of it."""
    got: list[Any] = []
    shown = io.StringIO()
    try:
        with (
            _limits(),
            contextlib.redirect_stderr(shown),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            code = in_one_line("fuzz", lambda: got.append(kind.read(folder)))
    except Late:
        return "hang", ""
    except OtherWeights as error:
        return "other weights", str(error)
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"
    if (folder / "ran").exists():
        (folder / "ran").unlink()
        return "code run", ""
    if code:
        said = shown.getvalue().strip().splitlines()
        line = said[-1] if said else ""
        return ("one line" if line.startswith("etr fuzz: ") else "traceback"), line
    if _same(got[0], expected):
        return "the same", ""
    return ("other weights" if kind.holds_weights else "read otherwise"), _difference(
        got[0], expected
    )


def _same(got: Any, expected: Any) -> bool:
    if isinstance(expected, dict) and isinstance(got, dict):
        return got.keys() == expected.keys() and all(_same(got[k], expected[k]) for k in expected)
    if isinstance(expected, torch.Tensor):
        # A config may ask for another data type.
        return got.shape == expected.shape and torch.equal(got, expected.to(got.dtype))
    return bool(got == expected)


def _difference(got: Any, expected: Any) -> str:
    if not isinstance(expected, dict) or not isinstance(got, dict):
        return repr(got)[:200]
    names = [n for n in {**expected, **got} if n not in got or n not in expected]
    return str(names or [n for n in expected if not _same(got[n], expected[n])])[:200]


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """An error where a case takes too long or too much memory."""

    def late(*_: object) -> None:
        raise Late

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, late)
    running = signal.setitimer(signal.ITIMER_REAL, SECONDS)  # perhaps that of the tests
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        signal.setitimer(signal.ITIMER_REAL, *running)


@contextlib.contextmanager
def _stdin_that_agrees() -> Iterator[None]:
    """Whoever asks whether code may run is told yes."""
    before = sys.stdin
    sys.stdin = io.StringIO("y\n" * 1000)
    try:
        yield
    finally:
        sys.stdin = before


def table(found: list[Found]) -> str:
    """Counts by outcome, in Markdown."""
    heads = {
        "one line": "an error of one line",
        "the same": "as if whole",
        "read otherwise": "other values",
        "traceback": "traceback",
        "hang": "hang",
        "other weights": "other weights",
        "code run": "code run",
    }
    rows: list[list[str | int]] = [
        [kind.name, sum(kind.outcomes.values()), *(kind.outcomes[name] for name in heads)]
        for kind in found
    ]
    totals = [sum(int(row[place]) for row in rows) for place in range(1, len(heads) + 2)]
    return sheet.table(["file", "tried", *heads.values()], [*rows, ["all", *totals]], "lr")


def fuzz_all(names: tuple[str, ...] = (), cases: int = CASES) -> list[Found]:
    """Try the named kinds, all by default; bad cases are printed.

    Args:
        names: of `benchmarks.fuzz_kinds.KINDS`.
        cases: damaged files of each kind.
    """
    from benchmarks.fuzz_kinds import KINDS

    found = []
    for name in names or tuple(KINDS):
        with tempfile.TemporaryDirectory() as folder:
            found.append(fuzz(KINDS[name], Path(folder) / "kind", cases))
        for number, outcome, seen in found[-1].examples:
            print(f"{name}: {outcome} in case {number}: {seen}", file=sys.stderr)
    return found


if __name__ == "__main__":
    print(table(tyro.cli(fuzz_all)))
