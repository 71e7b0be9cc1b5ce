"""`etr watch`: follow a run while it trains."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console, RenderableType
from rich.live import Live

from etr.cli._options import parse
from etr.report.dashboard import dashboard
from etr.report.live import LiveRun, find_runs


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Which run to follow. Ctrl-C ends it; it also ends with the run."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of a run, or of a comparison, whose newest run is shown in detail."""
    once: bool = False
    """Print one frame and end; so it is too where the output is not a terminal."""
    interval: float = 1.0
    """Time between looks at the files, seconds."""

    def __post_init__(self) -> None:
        if not 0.05 <= self.interval <= 3600:
            raise ValueError(f"interval={self.interval} must lie in [0.05, 3600], seconds")


def run(arguments: list[str]) -> int:
    """Show frames until the run is finished or Ctrl-C is pressed."""
    config = parse(WatchConfig, "watch", arguments)
    console = Console(file=sys.stdout)
    watched = Watched(Path(config.run))
    if config.once or not console.is_terminal:
        watched.poll()
        console.print(watched.frame(console))
        return 0
    try:
        with Live(console=console, auto_refresh=False) as live:
            for frame in frames(watched, console, config.interval):
                live.update(frame, refresh=True)
    except KeyboardInterrupt:
        pass  # how one leaves; the last frame stays
    return 0


class Watched:
    """The runs of a folder, and the one that is shown in detail.

    Args:
        folder: of a run or a comparison; runs that appear later are found too.
    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs: list[LiveRun] = []
        self.focus: LiveRun | None = None
        self._find()

    def poll(self) -> bool:
        """Read what is new; True if there was anything."""
        found = self._find()
        new = [run.poll() for run in self.runs]
        # Runs of a comparison advance in turn: stay with one until it is finished.
        if self.focus is None or (self.focus.finished and any(new)):
            self.focus = max(self.runs, key=lambda run: (not run.finished, run.modified or 0.0))
        return found or any(new)

    def frame(self, console: Console) -> RenderableType:
        """What there is to see now."""
        return dashboard(
            self.runs,
            self.focus or self.runs[0],
            now=time.time(),
            width=console.width,
            height=console.height,
        )

    @property
    def finished(self) -> bool:
        """All runs are."""
        return all(run.finished for run in self.runs)

    def _find(self) -> bool:
        known = {run.folder for run in self.runs}
        new = [LiveRun(folder=folder) for folder in find_runs(self.folder) if folder not in known]
        self.runs = sorted([*self.runs, *new], key=lambda run: run.folder)
        return bool(new)


def frames(watched: Watched, console: Console, interval: float) -> Iterator[RenderableType]:
    """Frames until the runs are finished and nothing new comes.

    Args:
        watched: what to follow.
        console: its size decides how much is shown.
        interval: time between frames, seconds.
    """
    while True:
        new = watched.poll()
        yield watched.frame(console)
        if watched.finished and not new:
            return
        time.sleep(interval)
