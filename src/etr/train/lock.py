"""One writer a folder: who holds it, and what to do about it.

The lock is the system's, so that it ends with its process however that dies. Where a file system
does not carry locks from one machine to another, a note that its writer renews tells that it lives.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from etr.files import find_object, write_json
from etr.moe.notice import warn
from etr.parallel import Ranks

GRACE_SECONDS = 3.0
"""How long to wait for a process that is about to end."""
BEAT_SECONDS = 5.0
"""Time between renewals of the note."""
SILENCE_SECONDS = 20.0
"""A writer on another machine whose note has not changed for so long is dead."""


@contextlib.contextmanager
def locked(path: Path, ranks: Ranks | None = None) -> Iterator[None]:
    """Hold a lock while the block runs; rank 0 holds it for all.

    Args:
        path: the lock's file, beside what it guards; its folder is made.
        ranks: all of them call this; None for this process alone.
    Raises:
        ValueError: another process holds it, which is named, or nothing can be written there.
    """
    ranks = ranks or Ranks(None)
    with contextlib.ExitStack() as held:
        problem = None
        if ranks.is_first:
            try:
                held.enter_context(_held(path))
            except OSError as error:
                problem = f"{path.parent} cannot be written to: {error}"
            except InUse as error:
                problem = str(error)
        problem = ranks.from_first(problem)
        if problem is not None:
            raise ValueError(problem)
        yield


class InUse(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    note = path.with_name(f"{path.name}.json")
    lock = FileLock(path, timeout=GRACE_SECONDS, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise InUse(_in_use(path, find_object(note))) from None
    except OSError as error:
        if not os.access(path.parent, os.W_OK):
            raise
        warn(f"{path} cannot be locked ({error}); its note alone guards it")
    try:
        found = find_object(note)
        host = None if found is None else found.get("host")
        alone = lock.is_locked and host in (None, socket.gethostname())
        if not alone and _lives(note):
            raise InUse(_in_use(path, found))
        with _renewed(note):
            yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def _lives(note: Path) -> bool:
    """Whether somebody renews a note; looks on for a while."""
    before, end = find_object(note), time.monotonic() + SILENCE_SECONDS
    while before is not None and time.monotonic() < end:
        time.sleep(BEAT_SECONDS / 10)
        now = find_object(note)
        if now != before:
            return now is not None
    return False


@contextlib.contextmanager
def _renewed(note: Path) -> Iterator[None]:
    """Write who this is and renew it until the block ends."""
    stop = threading.Event()
    values = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}

    def renew() -> None:
        count = 1
        while not stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk is no reason to stop
                write_json(note, {**values, "renewed": count})
            count += 1

    write_json(note, {**values, "renewed": 0})
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        note.unlink(missing_ok=True)


def _in_use(path: Path, found: dict[str, Any] | None) -> str:
    if found is None:
        return f"{path} is locked by another process; wait for it, or name another folder"
    return (
        f"{path} is locked by process {found.get('pid')} on {found.get('host')}, which writes "
        f"there since {found.get('since')}; wait for it, end it, or name another folder"
    )
