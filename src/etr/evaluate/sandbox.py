"""Running code that a model wrote, behind walls of the system.

Each program runs in a fresh Python of its own (`etr.evaluate.sandboxed`): the standard library
alone, an empty folder of limited size as the only place to write, limits on memory and time, and no
further process. The walls are, in this order, what the machine gives:

- bubblewrap, or where it is not installed the same unprivileged Linux namespaces: a read-only root
  with Python and the libraries in it and nothing else, no network, no other process to be seen; all
  in there ends at once;
- with or without those, a filter on system calls, by libseccomp;
- with neither, as on macOS, a hook in Python, which stops accidents alone.

A result says which walls were missing. What passes is decided outside the process of the code that
is judged: tests run in a process of their own, behind the same walls, and call the function by
messages of literals.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from etr.evaluate.sandboxed import view

Walls = Literal["bubblewrap", "namespaces", "none"]
START_SECONDS = 60.0
"""How long the walls may take to stand; not part of a program's time."""
FILTER = "a filter of system calls"
PASSED = "passed"
REPORT_BYTES = 2**16
BOOT = "import sys; sys.path += [{!r}]; from sandboxed.child import main; sys.path.pop(); main()"


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """What a program may use."""

    seconds: float = 10.0
    """Wall time, seconds; also the processor time, rounded up."""
    memory_bytes: int = 512 * 2**20
    """Address space, bytes."""
    file_bytes: int = 2**20
    """Largest file that it may write, bytes."""
    folder_bytes: int = 2**24
    """All files that it may write together, bytes."""

    def __post_init__(self) -> None:
        for name, least in (
            ("seconds", 0.1),
            ("memory_bytes", 64 * 2**20),
            ("file_bytes", 4096),
            ("folder_bytes", 4096),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Code that is not trusted, and the function of it that tests call."""

    code: str
    """Source text."""
    function: str
    """A name in it."""


@dataclass(frozen=True, kw_only=True)
class SandboxResult:
    """How a program ended."""

    passed: bool
    """Whether it ran to its end without an exception."""
    reason: str
    """"passed", the exception, or what stopped it."""
    missing: tuple[str, ...]
    """The walls that this system did not give, in words."""


def run_sandboxed(
    code: str,
    limits: SandboxLimits | None = None,
    *,
    answer: Answer | None = None,
    walls: Walls | None = None,
) -> SandboxResult:
    """Run a Python program, e.g. the tests of a generated function.

    It passes only by reaching its end: leaving early, even with exit code 0, does not count. But
    that is the word of `code` itself. What is to be judged is therefore no part of it but the
    `answer`, which never sees the tests, and of which nothing but values reaches them.

    Args:
        code: source text; its output is thrown away. The answer's function is `candidate` in it.
        limits: what each of the two programs may use; they share the wall time.
        answer: code to be judged, run in a process of its own. Arguments and results are None,
            numbers, texts, bytes, and lists, tuples, sets and dictionaries of these, and are
            copies. Any other result can be iterated if it could be, and is equal to nothing.
        walls: the kind to use; by default the best that works here.
    Raises:
        ValueError: the system is no POSIX one, which has no such limits; or it does not give
            these walls.
        OSError: a process could not be started.
    """
    if os.name != "posix":
        raise ValueError(f"os.name={os.name!r}: generated code runs on Linux and macOS only")
    if walls not in (None, *available_walls()):
        raise ValueError(f"walls={walls!r}: this system gives only {', '.join(available_walls())}")
    return _run(code, limits or SandboxLimits(), answer, walls or available_walls()[0])


@functools.cache
def available_walls() -> tuple[Walls, ...]:
    """The kinds that work on this system, best first, found by trying each once."""
    found: list[Walls] = ["none"]
    kinds: tuple[Walls, ...] = ("namespaces", "bubblewrap")
    for kind in kinds:
        with contextlib.suppress(OSError):
            _run("", SandboxLimits(), None, kind)
            found.insert(0, kind)
    return tuple(found)


def describe_walls() -> str:
    """What stands between generated code and this system, in words, to be shown beside scores."""
    names = {"bubblewrap": "bubblewrap", "namespaces": "Linux namespaces", "none": "POSIX limits"}
    walls, missing = names[available_walls()[0]], run_sandboxed("").missing
    return f"{walls}; missing: {'; '.join(missing)}" if missing else f"{walls} and {FILTER}"


def _run(code: str, limits: SandboxLimits, answer: Answer | None, walls: Walls) -> SandboxResult:
    with contextlib.ExitStack() as stack:

        def start(part: dict[str, Any], pipes: tuple[int, ...]) -> _Program:
            program = _Program(part, pipes, limits, walls)
            stack.callback(program.close)
            return program

        tests = {"part": "tests", "code": code}
        if answer is None:
            programs = [start(tests, ())]
        else:
            judged = {"part": "answer", "code": answer.code, "function": answer.function}
            with _pipe() as (requests, to_answer), _pipe() as (replies, from_answer):
                programs = [
                    start(judged, (requests, from_answer)),
                    start(tests, (to_answer, replies)),
                ]
        missing = [wall for program in programs for wall in program.missing()]
        reason = programs[-1].ending(limits.seconds)
    missing = list(dict.fromkeys(missing))
    return SandboxResult(passed=reason == PASSED, reason=reason, missing=tuple(missing))


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


class _Program:
    """A process behind walls.

    Args:
        part: what it is to do, for `child.main`.
        pipes: descriptors through which it talks to another program.
    """

    def __init__(
        self, part: dict[str, Any], pipes: tuple[int, ...], limits: SandboxLimits, walls: Walls
    ) -> None:
        self.walls = walls
        self.text = b""  # of the report, as far as it was read and not yet used
        command = _command(walls, limits)
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            self.report, report = os.pipe()
            stack.callback(os.close, self.report)
            order = part | {
                "pipes": pipes,
                "report": report,
                "walls": walls,
                "view": view.visible(),
                "folder": folder,
                "folder_bytes": limits.folder_bytes,
                "file_bytes": limits.file_bytes,
                "memory_bytes": limits.memory_bytes,
                "cpu_seconds": int(limits.seconds) + 1,
                "root": os.geteuid() == 0,
            }
            try:
                self.process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    env={},
                    pass_fds=(report, *pipes),
                    start_new_session=True,
                )
            finally:
                os.close(report)
            stack.callback(self._end)
            with contextlib.suppress(BrokenPipeError):
                self._stdin().write(json.dumps(order).encode() + b"\n")
                self._stdin().flush()
            self.close = stack.pop_all().close

    def _stdin(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    def missing(self) -> list[str]:
        """Wait for the walls; which of them this system did not give.

        Raises:
            OSError: the process did not get so far.
        """
        found = self._line(time.monotonic() + START_SECONDS)
        if "missing" not in found:
            raise OSError(f"the sandbox did not start: {found.get('error', 'no reason given')}")
        return list(found["missing"])

    def ending(self, seconds: float) -> str:
        """Wait for the end of the code, that long at most; how it ended, in words."""
        deadline = time.monotonic() + seconds
        try:
            found = self._line(deadline)
            if found.get("passed") is True:
                return PASSED
            if "error" in found:
                return str(found["error"])
            code = self.process.wait(max(0.0, deadline - time.monotonic()))
            return f"ended early with code {code}"
        except (TimeoutError, subprocess.TimeoutExpired):
            return f"stopped after {seconds:g} s"

    def _line(self, deadline: float) -> dict[str, Any]:
        """The next line of the report; empty where there is none, or what the program wrote there
        is not a report.

        Raises:
            TimeoutError: there was none before the deadline.
        """
        poll = select.poll()
        poll.register(self.report, select.POLLIN)
        while b"\n" not in self.text and len(self.text) < REPORT_BYTES:
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            chunk = os.read(self.report, REPORT_BYTES)
            if not chunk:
                break
            self.text += chunk
        line, _, self.text = self.text.partition(b"\n")
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def _end(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin().close()  # in namespaces, whoever waits outside ends all within
        if self.walls != "namespaces":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _command(walls: Walls, limits: SandboxLimits) -> list[str]:
    """How to start `child.main`."""
    folder, outside = view.INSIDE, []
    if walls == "bubblewrap":
        program = shutil.which("bwrap")
        if program is None:
            raise FileNotFoundError("bwrap is not installed")
        outside = view.bubblewrap(program, view.visible(), limits.folder_bytes)
    else:
        folder = str(Path(view.__file__).parent)
    parent = str(Path(folder).parent)
    return [*outside, view.interpreter(), "-I", "-S", "-c", BOOT.format(parent)]
