"""What a person sees of long work: bars on a terminal, elsewhere lines.

What is under way is logged, here and in the library, as messages of loggers below ``etr``. Where
output is not a terminal, a `Pulse` prints the last one after every `SILENCE`.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

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
from rich.progress import track as track_on_terminal

from etr.prose import prose_text

log = logging.getLogger(__name__)

T = TypeVar("T")
PLAIN_EVERY = 50
"""Steps between lines where the output is not a terminal."""
SILENCE = 25.0
"""Seconds between lines of a `Pulse`."""


class Pulse(logging.Handler):
    """Says in every period of `SILENCE` what was logged last.

    Args:
        title: begins each line.
        say: prints a line.
        clock: seconds.
    """

    def __init__(
        self, title: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self._title, self._say, self._clock = title, say, clock
        self._began = self._last = clock()
        self._status = "working"

    def emit(self, record: logging.LogRecord) -> None:
        self._status = record.getMessage()

    def beat(self) -> float:
        """Print a line if one is due; seconds until the next is."""
        now = self._clock()
        if now - self._last >= SILENCE:
            self._say(f"{self._title}: {self._status} ({now - self._began:.0f} s)")
            self._last = now
        return self._last + SILENCE - now

    def keep_on(self, wait: Callable[[float], bool]) -> None:
        """Beat until ``wait(seconds)`` says that the work has ended."""
        while not wait(self.beat()):
            pass


@contextmanager
def pulse(verb: str) -> Iterator[None]:
    """Print lines while the block runs, on the first rank and where output is not a terminal."""
    out = sys.stderr if verb == "generate" else sys.stdout  # the text is generate's output
    if out.isatty() or os.environ.get("RANK", "0") != "0":
        yield
        return
    logger, ended = logging.getLogger("etr"), threading.Event()
    level = logger.level
    beating = Pulse(f"etr {verb}", lambda line: print(line, file=out, flush=True))
    thread = threading.Thread(target=beating.keep_on, args=(ended.wait,), daemon=True)
    logger.addHandler(beating)
    logger.setLevel(logging.INFO)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        logger.removeHandler(beating)
        logger.setLevel(level)


class TrainingProgress:
    """A bar per run with loss, speed and drop rate; plain lines where there is no terminal."""

    def __init__(self, progress: Progress, console: Console, total: int) -> None:
        self._progress, self._console, self._total = progress, console, total
        self._tasks: dict[str, Any] = {}

    def step(self, name: str, row: dict[str, Any]) -> None:
        """Show one row of metrics; diagnostics and profiles are for the report alone."""
        if row["kind"] not in ("train", "eval", "alarm"):
            return
        text = describe(row)
        if row["kind"] != "train":
            line = prose_text(f"{name:>12}  step {row['step']:>5}  {text}")
            self._console.print(line, highlight=False, soft_wrap=True)
            return
        log.info("%s step %d/%d, %s", name, row["step"], self._total, text)
        if not self._console.is_terminal:
            if row["step"] % PLAIN_EVERY == 0:
                print(f"{name:>12}  step {row['step']:>5}/{self._total}  {text}", flush=True)
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=self._total, text="")
        self._progress.update(self._tasks[name], completed=row["step"], text=text)


def describe(row: dict[str, Any]) -> str:
    """A row of training, evaluation or alarm in a few words."""
    if row["kind"] == "alarm":
        return f"ALARM {row['message']}"
    bound = " (upper bound)" if row.get("bound") else ""
    if row["kind"] == "eval":
        return (
            f"held-out loss {row['val_loss']:.4f} nats/token{bound} ({row['selection']}, "
            f"kept {row['kept_fraction_eval']:.3f})"
        )
    return (
        f"loss {row['loss']:.3f}{bound}  {row['tokens_per_second']:,.0f} tok/s  "
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

        def show(done: int, total: int) -> None:
            log.info("%s %.1f/%.1f MB", description, done / 1e6, total / 1e6)
            progress.update(task, completed=done, total=total)

        yield show


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

        def show(step: int, text: str) -> None:
            log.info("%s %d/%d, %s", description, step, total, text)
            progress.update(task, completed=step, text=text)

        yield show


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """The items, with a bar of how many were taken."""
    for number, item in enumerate(track_on_terminal(items, description, total), 1):
        log.info("%s %d/%d", description, number, total)
        yield item
