"""The option ``--import FILE``, for configs of runs and of verbs that need no run."""

from __future__ import annotations

from typing import Annotated

import tyro

Imports = Annotated[
    tuple[str, ...], tyro.conf.arg(name="import", metavar="FILE"), tyro.conf.UseAppendAction
]
"""Python files with methods of one's own, once for each."""
