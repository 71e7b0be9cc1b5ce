"""Warnings of this library: of one kind, and placed at the line of the caller's own code."""

from __future__ import annotations

import sys
import warnings

PASSED_OVER = {"etr", "etr_command", "torch", "transformers", "accelerate", "peft", "trl"} | {
    "contextlib",
    "importlib",
}
"""Packages between whom a warning is for and where it is raised."""


class EtrWarning(UserWarning):
    """Something that the library goes on in spite of."""


def warn(text: str) -> None:
    """Warn, at the innermost line that belongs to none of `PASSED_OVER`."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _root(frame.f_globals.get("__name__")) in PASSED_OVER:
        frame = frame.f_back
    warnings.warn_explicit(
        text,
        EtrWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _root(name: str | None) -> str:
    return (name or "").partition(".")[0]
