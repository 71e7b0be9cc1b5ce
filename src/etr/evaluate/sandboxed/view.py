"""What of this machine a program in the sandbox sees: Python, the libraries, and nothing else."""

from __future__ import annotations

import os
import sys
from collections import namedtuple

WRITABLE = "/tmp"
"""Where the one writable folder is, inside."""
INSIDE = "/sandboxed"
"""Where the folder of this file is, inside bubblewrap."""
USER = 1000
"""User and group as programs see them."""
LIBRARIES = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store", "/gnu/store",
    "/etc/ld.so.cache",
)  # fmt: skip
DEVICES = ("/dev/null", "/dev/urandom")


class Entry(namedtuple("Entry", ("kind", "path"))):
    """A path and what becomes of it: "bind" (shown as it is), "link" (the same symbolic link), or
    "hide" (an empty folder in its place)."""

    kind: str
    path: str


def interpreter() -> str:
    """The Python that a virtual environment stands on; its libraries lie beside it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def visible() -> list[Entry]:
    """All that a program sees of this machine, read-only; no installed package is among it, since
    those may hold the tests."""
    import glob  # who asks for this is outside, where its time does not count

    python = interpreter()
    prefixes = (os.path.dirname(os.path.dirname(python)), sys.base_prefix, sys.base_exec_prefix)
    own = [os.path.realpath(f"{prefix}/{name}") for prefix in prefixes for name in ("lib", "lib64")]
    entries: list[Entry] = []
    for path in (*LIBRARIES, *own, python, *DEVICES):
        if not os.path.exists(path) or any(_holds(e.path, path) for e in entries):
            continue
        if os.path.islink(path):
            entries.append(Entry("link", path))
            continue
        entries.append(Entry("bind", path))
        for pattern in ("*-packages", "python*/*-packages"):
            found = sorted(glob.glob(os.path.join(glob.escape(path), pattern)))
            entries += [Entry("hide", p) for p in found if os.path.isdir(p)]
    return entries


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def bubblewrap(program: str, view: list[Entry], folder_bytes: int) -> list[str]:
    """The command that puts what follows it behind the same walls, by bubblewrap."""
    command = [
        program, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent",
        "--new-session", "--clearenv", "--cap-drop", "ALL", "--hostname", "sandbox",
        "--uid", str(USER), "--gid", str(USER),
    ]  # fmt: skip
    for kind, path in view:
        if kind == "link":
            command += ["--symlink", os.readlink(path), path]
        elif kind == "hide":
            command += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
        else:
            command += ["--dev-bind" if path in DEVICES else "--ro-bind", path, path]
    command += ["--ro-bind", os.path.dirname(__file__), INSIDE]
    command += ["--size", str(folder_bytes), "--tmpfs", WRITABLE, "--remount-ro", "/"]
    return [*command, "--chdir", WRITABLE, "--"]
