"""Running code that a model wrote, in a process with little memory, little time and no network.

Each program runs in a fresh Python of its own (`sandbox_child.py`): standard library alone, an
empty folder as working directory, limits on memory, processor time and file size, a network
namespace without interfaces where the system allows one, and an audit hook that refuses sockets,
further processes, and writing outside the folder. Its process group is killed at the end. This
stops accidents; it is no wall against code made to break out, for which use a virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """What a program may use."""

    seconds: float = 10.0
    """Wall time, seconds; also the processor time, rounded up."""
    memory_bytes: int = 512 * 2**20
    """Address space, bytes."""
    file_bytes: int = 2**20
    """Largest file that it may write, bytes."""

    def __post_init__(self) -> None:
        for name, least in (("seconds", 0.1), ("memory_bytes", 64 * 2**20), ("file_bytes", 4096)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class SandboxResult:
    """How a program ended.

    Args:
        passed: it ran to its end without an exception.
        reason: "passed", the exception, or what stopped it.
        network: "namespace" where it had no network interface at all, else "refused": sockets were
            refused inside Python alone.
    """

    passed: bool
    reason: str
    network: str


def run_sandboxed(code: str, limits: SandboxLimits | None = None) -> SandboxResult:
    """Run a Python program, e.g. a generated function with its tests.

    It passes only by reaching its end: leaving early, even with exit code 0, does not count.

    Args:
        code: source text; its output is thrown away.
        limits: what it may use.
    Raises:
        ValueError: the system is no POSIX one, which has no such limits.
    """
    if os.name != "posix":
        raise ValueError(f"os.name={os.name!r}: generated code runs on Linux and macOS only")
    limits = limits or SandboxLimits()
    token = secrets.token_hex(16)
    order = {
        "code": code,
        "token": token,
        "cpu_seconds": int(limits.seconds) + 1,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
    }
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as report:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"TMPDIR": folder, "HOME": folder, "PATH": os.defpath},
            start_new_session=True,
        )
        timed_out = False
        try:
            process.communicate(json.dumps(order).encode() + b"\n", timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _kill_group(process)
        report.seek(0)
        found = _read(report.read(limits.file_bytes))
    network = "namespace" if found.get("namespace") else "refused"
    if found.get("token") == token:
        return SandboxResult(passed=True, reason="passed", network=network)
    if timed_out or process.returncode == -signal.SIGXCPU:
        reason = f"stopped after {limits.seconds:g} s"
    else:
        reason = str(found.get("error", f"ended early with code {process.returncode}"))
    return SandboxResult(passed=False, reason=reason, network=network)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(text: bytes) -> dict[str, Any]:
    """The child's lines as one dictionary; what is no such line, the program itself wrote."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict):
            found.update(values)
    return found
