"""Warnings of the commands are one line, without a place in the code."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import warnings
from etr.cli._errors import in_one_line
from etr.moe.notice import warn

def work():
    warn("the cache is\\ndamaged, run `etr x`")
    warnings.warn("of another library", stacklevel=1)

assert in_one_line("x", work) == 0
warn("outside of a command")
"""


def test_own_warnings_are_one_line_and_others_stay() -> None:
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    own, other, outside = found.stderr.splitlines()
    assert own == "etr x: warning: the cache is damaged, run `etr x`"
    assert other == "<string>:8: UserWarning: of another library"
    assert outside == "<string>:11: EtrWarning: outside of a command"
