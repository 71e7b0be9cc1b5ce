"""What POSIX gives: limits of a process. Where no other wall stands, also a hook in Python."""

from __future__ import annotations

import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = (
    "socket.", "subprocess.", "ctypes.", "shutil.", "mmap.", "pty.", "webbrowser.", "urllib.",
    "sqlite3.", "signal.pthread_kill", "os.system", "os.fork", "os.exec", "os.posix_spawn",
    "os.spawn", "os.kill", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link",
    "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.setxattr", "os.putenv",
)  # fmt: skip
"""Audit events (their beginnings) that given code may not cause."""


def set_limits(memory_bytes: int, file_bytes: int, seconds: int) -> bool:
    """Limits on this process; False where memory cannot be limited (macOS)."""
    values = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in values.items():
        resource.setrlimit(limit, (value, value))
    if sys.platform == "darwin":
        return False
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    return True


def audit_hook(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """A hook that refuses sockets, processes, and writing outside `folder`.

    It stops accidents. Code made to get past it can.
    """
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
