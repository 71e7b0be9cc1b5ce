"""A root, a network and processes of one's own, by Linux's unprivileged user namespaces.

What bubblewrap does, for machines without it: no user on them need be given any right.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal

from .view import USER, WRITABLE, Entry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

# Of linux/sched.h, linux/mount.h, linux/prctl.h and linux/capability.h.
CLONE_ALL = 0x10000000 | 0x20000000 | 0x40000000 | 0x20000 | 0x8000000 | 0x4000000 | 0x2000000
"""User, process, network, mount, IPC, host name and control group namespaces."""
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = (
    442, -100, 0x8000, 1, 2,
)  # fmt: skip
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
CAPABILITY_VERSION_3 = 0x20080522


def enter(view: list[Entry], folder: str, folder_bytes: int, lifeline: int) -> None:
    """Move into new namespaces; returns in a new process that has no rights in them.

    The process that called waits outside, and never returns: it ends all in there once `lifeline`
    is closed at its other end, and takes over the exit code.

    Args:
        view: what of this machine is seen.
        folder: an empty one, to build the new root on.
        folder_bytes: size of the one writable folder.
    Raises:
        OSError: the system does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    _call(libc.unshare, CLONE_ALL)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{USER} {user} 1"),
        ("gid_map", f"{USER} {group} 1"),
    ):
        _write(f"/proc/self/{name}", text)
    with contextlib.suppress(OSError):  # where /proc/sys is read-only, the filter alone refuses it
        _write("/proc/sys/user/max_user_namespaces", "0")
    host = b"sandbox"
    _call(libc.sethostname, host, len(host))
    _change_root(libc, view, folder, folder_bytes)
    inside = os.fork()
    if inside:
        _wait(inside, lifeline)
    os.setsid()  # else kill(0) would reach the waiting process by the group
    drop_rights()


def drop_rights() -> None:
    """Give up all capabilities for good, and be killed when the process that started this ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails past the last one
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    _call(libc.capset, header, (ctypes.c_uint32 * 6)())
    _call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _change_root(libc: Any, view: list[Entry], folder: str, folder_bytes: int) -> None:
    def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
        texts = (source, target, kind)
        encoded = [None if text is None else os.fsencode(text) for text in texts]
        _call(libc.mount, *encoded, ctypes.c_ulong(flags), options.encode() or None)

    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for entry in view:
        target = f"{folder}{entry.path}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if entry.kind == "link":
            os.symlink(os.readlink(entry.path), target)
        elif entry.kind == "hide":
            mount("tmpfs", target, "tmpfs", 0, "size=4k,mode=555")
        else:
            if os.path.isdir(entry.path):
                os.makedirs(target, exist_ok=True)
            else:
                os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
            mount(entry.path, target, None, MS_BIND | MS_REC)
    os.mkdir(f"{folder}{WRITABLE}")
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)
    path = ctypes.c_char_p(os.fsencode(folder))
    _call(
        libc.syscall, SYS_MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, attributes,
        ctypes.c_size_t(32),
    )  # fmt: skip
    options = f"size={folder_bytes},nr_inodes=1024,mode=700"
    mount("tmpfs", f"{folder}{WRITABLE}", "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(folder)
    _call(libc.pivot_root, b".", b".")  # the old root now lies over the new one
    _call(libc.umount2, b".", MNT_DETACH)
    os.chdir(WRITABLE)


def _wait(process: int, lifeline: int) -> None:
    """End with the process, or end it when the other end of the lifeline is closed."""
    os.closerange(lifeline + 1, 2**31 - 1)
    handle = os.pidfd_open(process)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(lifeline, select.POLLIN)
    if any(number == lifeline for number, _ in poll.poll()):
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _call(function: Callable[..., int], *args: Any) -> None:
    if function(*args) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")
