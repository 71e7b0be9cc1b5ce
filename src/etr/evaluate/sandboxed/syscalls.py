"""A filter on system calls, by libseccomp, which most distributions install with their tools.

Inside namespaces it is a second wall: no further process, no socket, no memory beside the address
space, no reach into the kernel's rarer parts. Without namespaces it is the first: nothing can be
opened for writing or changed, and no other process can be signalled.
"""

from __future__ import annotations

import ctypes
import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

LIBRARY = "libseccomp.so.2"
REFUSED = (
    "fork", "vfork", "clone", "clone3", "execve", "execveat", "socket", "connect", "bind", "listen",
    "accept", "accept4", "unshare", "setns", "mount", "umount", "umount2", "pivot_root", "chroot",
    "move_mount", "open_tree", "fsopen", "fsmount", "fsconfig", "fspick", "mount_setattr", "ptrace",
    "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_open", "pidfd_getfd",
    "pidfd_send_signal", "shmget", "shmat", "shmctl", "msgget", "msgsnd", "semget", "mq_open",
    "memfd_create", "memfd_secret", "bpf", "perf_event_open", "userfaultfd", "io_uring_setup",
    "io_uring_enter", "io_uring_register", "add_key", "request_key", "keyctl", "syslog",
    "fanotify_init", "open_by_handle_at", "name_to_handle_at", "quotactl", "personality",
    "modify_ldt",
)  # fmt: skip
"""Calls that no program may make."""
CHANGES = (
    "creat", "mkdir", "mkdirat", "mknod", "mknodat", "rmdir", "unlink", "unlinkat", "rename",
    "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "truncate", "chmod",
    "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "lchown", "fchownat", "utime", "utimes",
    "utimensat", "futimesat", "setxattr", "lsetxattr", "fsetxattr", "setxattrat", "removexattr",
    "lremovexattr", "fremovexattr", "removexattrat", "openat2", "file_setattr", "tkill",
    "rt_sigqueueinfo", "rt_tgsigqueueinfo", "setpriority", "sched_setaffinity",
    "sched_setscheduler", "sched_setparam", "sched_setattr", "ioprio_set",
)  # fmt: skip
"""Calls that may not be made without namespaces: they change files, or other processes."""
SCMP_ACT_ALLOW, SCMP_ACT_ERRNO = 0x7FFF0000, 0x00050000
SCMP_CMP_NE, SCMP_CMP_MASKED_EQ = 1, 7


class ArgumentComparison(ctypes.Structure):
    """`struct scmp_arg_cmp`: a condition on one argument of a call."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def install(*, alone: bool) -> bool:
    """Refuse system calls from here on, with EPERM; False where libseccomp cannot, or is missing.

    Args:
        alone: there are no namespaces, so files and other processes need guarding as well.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
        library.seccomp_init.restype = ctypes.c_void_p
        rules = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(SCMP_ACT_ALLOW)))
        for name, condition in refused(alone=alone):
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number != -1:  # else it is newer than the library
                action = ctypes.c_uint32(SCMP_ACT_ERRNO | errno.EPERM)
                conditions: Any = (ArgumentComparison * len(condition))(*condition)
                add = library.seccomp_rule_add_array
                _check(add(rules, action, number, len(condition), conditions))
        _check(library.seccomp_load(rules))
    except OSError:
        return False
    return True


def refused(*, alone: bool) -> Iterator[tuple[str, tuple[ArgumentComparison, ...]]]:
    """Names of system calls, and when they are refused: on all conditions, or always."""
    for name in REFUSED + CHANGES * alone:
        yield name, ()
    if not alone:
        return
    for flag in os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC:
        yield "open", (ArgumentComparison(1, SCMP_CMP_MASKED_EQ, flag, flag),)
        yield "openat", (ArgumentComparison(2, SCMP_CMP_MASKED_EQ, flag, flag),)
    for name in ("kill", "tgkill"):
        yield name, (ArgumentComparison(0, SCMP_CMP_NE, os.getpid(), 0),)
    yield "prlimit64", (ArgumentComparison(0, SCMP_CMP_NE, 0, 0),)


def _check(found: int) -> None:
    if found < 0:
        raise OSError(-found, os.strerror(-found))
