"""What a person sees of long work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Row = dict[str, Any]
PLAIN_EVERY = 50
"""Steps between lines where the output is no terminal."""


class TrainingProgress:
    """A bar per run with loss, speed and drop rate; plain lines where there is no terminal."""

    def __init__(self, progress: Progress, console: Console, total: int) -> None:
        self._progress, self._console, self._total = progress, console, total
        self._tasks: dict[str, Any] = {}

    def step(self, name: str, row: Row) -> None:
        """Show one row of metrics; diagnostics and profiles are for the report alone."""
        if row["kind"] not in ("train", "eval", "alarm"):
            return
        text = describe(row)
        if row["kind"] != "train":
            self._console.print(
                f"{name:>12}  step {row['step']:>5}  {text}", highlight=False, soft_wrap=True
            )
            return
        if not self._console.is_terminal:
            if row["step"] % PLAIN_EVERY == 0:
                print(f"{name:>12}  step {row['step']:>5}/{self._total}  {text}", flush=True)
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=self._total, text="")
        self._progress.update(self._tasks[name], completed=row["step"], text=text)


def describe(row: Row) -> str:
    """A row of training, evaluation or alarm in a few words."""
    if row["kind"] == "alarm":
        return f"ALARM {row['message']}"
    if row["kind"] == "eval":
        return (
            f"held-out loss {row['val_loss']:.4f} nats/token ({row['selection']}, "
            f"kept {row['kept_fraction_eval']:.3f})"
        )
    return (
        f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tok/s  "
        f"drop {row.get('drop_rate', 0.0):.1%}"
    )


@contextmanager
def training_progress(total: int) -> Iterator[TrainingProgress]:
    """Show progress while the block runs.

    Args:
        total: optimizer steps of one run.
    """
    console = Console(file=sys.stdout)
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield TrainingProgress(progress, console, total)


@contextmanager
def bytes_progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes while the block runs; what it yields takes bytes done and bytes in all."""
    console = Console(file=sys.stdout)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def steps_progress(description: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """A bar of steps while the block runs; what it yields takes the step done and a few words."""
    console = Console(file=sys.stdout)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, text="")
        yield lambda step, text: progress.update(task, completed=step, text=text)
