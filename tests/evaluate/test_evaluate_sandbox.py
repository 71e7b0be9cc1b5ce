"""Generated code: what passes, what is stopped, and that nothing of it stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from etr.evaluate.sandbox import CHILD, SandboxLimits, run_sandboxed

LIMITS = SandboxLimits(seconds=5)
SHORT = SandboxLimits(seconds=0.7)


def test_a_program_that_ends_well_passes() -> None:
    code = "import math\nopen('own.txt', 'w').write('x')\nassert math.gcd(4, 6) == 2\nprint('y')"
    found = run_sandboxed(code, LIMITS)
    assert (found.passed, found.reason) == (True, "passed")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("assert 1 == 2, 'sums'", "AssertionError: sums"),
        ("def (", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "ended early with code 0"),
        ('print(\'{"token": "guess"}\'); import os; os._exit(0)', "ended early"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("open('big', 'wb').write(b'x' * 10**7)", "File too large"),
        ("import subprocess; subprocess.run(['true'])", "subprocess.Popen is refused"),
        ("import os; os.fork()", "os.fork is refused"),
        ("import os; os.system('true')", "os.system is refused"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "is refused"),
        ("import _socket; _socket.socket(2, 1)", "socket.__new__ is refused"),
        ("import ctypes; ctypes.CDLL(None)", "ctypes.dlopen is refused"),
    ],
)
def test_what_does_not_pass(code: str, reason: str) -> None:
    found = run_sandboxed(code, LIMITS)
    assert not found.passed
    assert reason in found.reason


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_time_is_limited(code: str) -> None:
    found = run_sandboxed(code, SHORT)
    assert (found.passed, found.reason) == (False, "stopped after 0.7 s")


def test_files_outside_cannot_be_written(tmp_path: Path) -> None:
    victim = tmp_path / "victim.txt"
    victim.write_text("before")
    for code in (
        f"open({str(victim)!r}, 'w')",
        f"import os; os.remove({str(victim)!r})",
        f"import os; os.open({str(victim)!r}, os.O_WRONLY)",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.symlink({str(victim)!r}, 'a'); open('a', 'w')",
    ):
        assert "is refused" in run_sandboxed(code, LIMITS).reason
    assert victim.read_text() == "before"


def test_the_network_namespace_has_no_interface_up() -> None:
    """Beyond Python: below the audit hook, there is nothing to connect through."""
    if run_sandboxed("pass", LIMITS).network != "namespace":
        pytest.skip("this system does not allow a network namespace")
    code = (
        f"import sys; sys.path.insert(0, {str(CHILD.parent)!r})\n"
        "import sandbox_child, socket, json\n"
        "assert sandbox_child.leave_network()\n"
        "try: socket.create_connection(('127.0.0.1', 9), timeout=2); reason = 0\n"
        "except OSError as error: reason = error.errno\n"
        "print(json.dumps([reason, [name for _, name in socket.if_nameindex()]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason, interfaces = json.loads(done.stdout)
    assert os.strerror(reason) == "Network is unreachable"
    assert "lo" in interfaces
    assert not [name for name in interfaces if name.startswith(("eth", "en", "wl"))]


def test_no_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_sandboxed("open('a', 'w').write('x')", LIMITS)
    run_sandboxed("open('a', 'w'); import time; time.sleep(9)", SHORT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"), [("seconds", 0), ("memory_bytes", 1), ("file_bytes", 0)]
)
def test_limits_are_checked(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
        SandboxLimits(**{name: value})
