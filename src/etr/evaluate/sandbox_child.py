"""Run by `sandbox.py` as a script, alone and isolated: limits this process, then runs given code.

Reads one JSON line from standard input, {"code", "token", "memory_bytes", ...}. Writes one JSON
line, {"namespace": ...}, before the code runs, and one after it: with the token if it ended well.
Imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # of linux/sched.h
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = (
    "socket.", "subprocess.", "ctypes.", "shutil.", "mmap.", "pty.", "webbrowser.", "urllib.",
    "os.system", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill",
    "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "os.chown", "os.putenv", "signal.pthread_kill",
)  # fmt: skip
"""Audit events (their beginnings) that given code may not cause."""


def set_limits(order: dict[str, Any]) -> None:
    """Memory, processor time, size of files, and no core file or further process."""
    seconds = order["cpu_seconds"]
    for limit, value in (
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def leave_network() -> bool:
    """Move into an empty network namespace; False where the system does not allow it."""
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    return library.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0 or library.unshare(CLONE_NEWNET) == 0


def guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses sockets, processes, and writing outside `folder`."""
    inside = os.path.join(os.path.realpath(folder), "")
    realpath, fspath = os.path.realpath, os.fsdecode

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            writes = flags & WRITE_FLAGS and not isinstance(path, int)
            if writes and not realpath(fspath(path)).startswith(inside):
                raise PermissionError(f"writing {path!r} is refused")
        elif event.startswith(REFUSED):
            raise PermissionError(f"{event} is refused")

    return hook


def main() -> None:
    """Read the order, shut the doors, run the code."""
    order = json.loads(sys.stdin.readline())
    report = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    namespace = leave_network()
    set_limits(order)
    print(json.dumps({"namespace": namespace}), file=report, flush=True)
    sys.addaudithook(guard(os.getcwd()))
    try:
        exec(compile(order["code"], "answer.py", "exec"), {"__name__": "__main__"})
        ending = {"token": order["token"]}
    except BaseException as error:
        ending = {"error": f"{type(error).__name__}: {error}"[:200]}
    print(json.dumps(ending), file=report, flush=True)
    os._exit(0)  # no handler that the code registered runs


if __name__ == "__main__":
    main()
