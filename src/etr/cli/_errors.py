"""Errors that a person can act on, as one line and an exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from etr.moe.notice import EtrWarning
from etr.prose import prose_line

CLOSED, FAILED, INTERRUPTED = 1, 2, 130

ELSEWHERE = (
    ("etr.train.loop", "TrainingDiverged"),
    ("safetensors", "SafetensorError"),
    ("huggingface_hub.errors", "StrictDataclassError"),
    ("torch", "OutOfMemoryError"),
    ("zipfile", "BadZipFile"),
)
"""Kinds of error that belong to modules, which are loaded wherever one of these can be raised."""


def in_one_line(verb: str, work: Callable[[], int | None]) -> int:
    """Do the work of a verb; what a person can act on is printed without a traceback.

    Args:
        verb: for the message.
        work: returns the exit code, or None for 0.
    Returns:
        The exit code: 2 after an error, 130 after an interrupt, 1 where nobody reads the output.
    """
    try:
        with _warnings_in_one_line(verb):
            code = int(work() or 0)
        sys.stdout.flush()  # a closed pipe shows here, not when the interpreter ends
        return code
    except KeyboardInterrupt:
        message, code = "interrupted", INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough. The interpreter would try to write once again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "etr":
            raise
        message, code = f"needs the package {error.name}: pip install 'etr-moe[train]'", FAILED
    except _expected() as error:
        message, code = describe(error), FAILED
    _say(f"etr {verb}: {message}")
    return code


@contextmanager
def _warnings_in_one_line(verb: str) -> Iterator[None]:
    """Show this library's warnings without the place in the code, and others as they are."""
    usual = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> str:
        if not issubclass(category, EtrWarning):
            return usual(message, category, *place, **more)
        return _line(f"etr {verb}: warning: {' '.join(str(message).split())}")

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _say(text: str) -> None:
    sys.stderr.write(_line(text))


def _line(text: str) -> str:
    return f"{prose_line(text, terminal=sys.stderr.isatty())}\n"


def describe(error: BaseException) -> str:
    """The error in one line."""
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read"
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(names)}: {error.strerror}"
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory"
    return " ".join(str(error).split()) or type(error).__name__


def _expected() -> tuple[type[BaseException], ...]:
    """Kinds of error that come from what a person gave; others are faults of the program."""
    found = [getattr(sys.modules.get(module), name, None) for module, name in ELSEWHERE]
    return (ValueError, OSError, RecursionError, MemoryError, *filter(None, found))
