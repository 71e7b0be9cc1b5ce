"""Numbers of each expert as text: runs of equal ones."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby


def numbers_of(text: str, field: str) -> list[int]:
    """Read ``4x64+2x128+256``; none for an empty text.

    Args:
        field: what holds it, for errors.
    Raises:
        ValueError: the text cannot be read.
    """
    found: list[int] = []
    for run in filter(None, text.split("+")):
        times, _, number = run.rpartition("x")
        if not (number.isdigit() and (times or "1").isdigit() and int(times or 1)):
            raise ValueError(
                f"{field}={text!r} must be {field} or runs of equal ones joined by +, "
                "e.g. 4x64+2x128+256"
            )
        found += int(times or 1) * [int(number)]
    return found


def text_of(numbers: Iterable[int]) -> str:
    """Inverse of `numbers_of`."""
    runs = ((number, len(list(run))) for number, run in groupby(numbers))
    return "+".join(f"{times}x{number}" if times > 1 else str(number) for number, times in runs)
