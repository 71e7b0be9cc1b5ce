"""Running a study on a terminal: progress, and how to go on where it was stopped."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from etr.study.study import StudyRunner

log = logging.getLogger(__name__)


def run_study(runner: StudyRunner, blocks: Sequence[str], again: str) -> int:
    """Run what is missing of a study, then write its page; the process's exit status.

    Args:
        blocks: to run; all where none is named.
        again: how to go on after Ctrl-C.
    """
    console = Console(file=sys.stdout)
    columns = (
        TextColumn("{task.description:>28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def show(block: str, done: int, total: int) -> None:
            if block not in tasks:
                tasks[block] = progress.add_task(block, total=total)
                if not console.is_terminal:
                    print(f"{block}: {total} steps", flush=True)
            log.info("%s %d/%d steps", block, done, total)
            progress.update(tasks[block], completed=done)

        try:
            page = runner.run(blocks, show)
        except KeyboardInterrupt:
            print(f"stopped; go on with:\n{again}")
            return 130
    print(f"page: {page}")
    return 0
