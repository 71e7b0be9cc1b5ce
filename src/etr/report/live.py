"""Following a run that is still being written: its metrics as they grow."""

from __future__ import annotations

import math
import os
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from etr.files import find_object, parse_row

LiveRow = Mapping[str, Any]
METRICS = "metrics.jsonl"
RECENT_STEPS = 50
"""Steps over which speed is averaged."""
NUM_ALARMS = 20
"""Latest alarms that are remembered."""


class MetricsTail:
    """Rows of a growing JSON-lines file, each read once.

    A last line that is still being written waits until it is whole. A file that was replaced or
    became shorter, as by a resumed run, is read again from its start.

    Args:
        path: the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.modified: float | None = None
        """When the file was last written, in seconds since the epoch."""
        self.num_damaged = 0
        """Whole lines that were not JSON objects and are left out."""
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._seen = b""

    def poll(self) -> tuple[list[LiveRow], bool]:
        """Rows that came since the last call, and whether the file began anew."""
        try:
            with self.path.open("rb") as file:
                anew = self._began_anew(file)
                file.seek(self._offset)
                *lines, _ = file.read().split(b"\n")
        except FileNotFoundError:
            anew = self._offset > 0
            self._file, self._offset = None, 0
            return [], anew
        if lines:
            self._offset += sum(len(line) + 1 for line in lines)
            self._seen = lines[-1]
        rows = [row for line in lines if line.strip() and (row := self._row(line)) is not None]
        return rows, anew

    def _began_anew(self, file: BinaryIO) -> bool:
        stat = os.fstat(file.fileno())
        this, before = (stat.st_dev, stat.st_ino), self._file
        self._file, self.modified = this, stat.st_mtime
        if before is None or (this == before and self._still_there(file, stat.st_size)):
            return False
        self._offset, self.num_damaged, self._seen = 0, 0, b""
        return True

    def _still_there(self, file: BinaryIO, size: int) -> bool:
        """Whether what was read last is where it was: file systems use numbers of files again."""
        if size < self._offset:
            return False
        length = len(self._seen) + 1
        if self._offset < length:
            return True
        file.seek(self._offset - length)
        return file.read(length) == self._seen + b"\n"

    def _row(self, line: bytes) -> LiveRow | None:
        row = parse_row(line)
        self.num_damaged += row is None
        return row


@dataclass(kw_only=True)
class LiveRun:
    """A run's folder, and what is known of the run so far. `poll` brings it up to date."""

    folder: Path
    """Holds config.json and metrics.jsonl."""
    total_steps: int | None = None
    """Steps the run is going to make, as its config says."""
    losses: list[float] = field(default_factory=list)
    """Training loss of each step, nats per token."""
    last: LiveRow = field(default_factory=dict)
    """The latest training row; empty before the first."""
    evaluations: dict[str, LiveRow] = field(default_factory=dict)
    """The latest evaluation of each selection."""
    alarms: deque[LiveRow] = field(default_factory=lambda: deque(maxlen=NUM_ALARMS))
    """The latest alarms, oldest first."""
    num_alarms: int = 0
    """All alarms so far."""

    def __post_init__(self) -> None:
        self._tail = MetricsTail(self.folder / METRICS)
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._speeds: deque[float] = deque(maxlen=RECENT_STEPS)

    def poll(self) -> bool:
        """Read what is new; True if there was anything."""
        rows, anew = self._tail.poll()
        if anew:
            self._forget()
        if anew or self.total_steps is None:
            self.total_steps = planned_steps(self.folder)
        for row in rows:
            self._add(row)
        return bool(rows) or anew

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """Steps done."""
        step = self.last.get("step")
        return step if isinstance(step, int) else 0

    @property
    def modified(self) -> float | None:
        """When the metrics were last written, in seconds since the epoch."""
        return self._tail.modified

    @property
    def num_damaged(self) -> int:
        """Lines of the metrics that cannot be read."""
        return self._tail.num_damaged

    @property
    def finished(self) -> bool:
        """All steps are done, and the evaluation after the last one is too."""
        if self.total_steps is None or self.step < self.total_steps:
            return False
        return any(row.get("step") == self.step for row in self.evaluations.values())

    @property
    def step_seconds(self) -> float | None:
        """Median time of the latest steps, seconds."""
        return statistics.median(self._step_seconds) if self._step_seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Mean speed over the latest steps."""
        return statistics.fmean(self._speeds) if self._speeds else None

    @property
    def seconds_left(self) -> float | None:
        """Time to the end at the present speed, without evaluations, seconds."""
        if self.total_steps is None or self.step_seconds is None:
            return None
        return max(self.total_steps - self.step, 0) * self.step_seconds

    def _forget(self) -> None:
        for known in (self.losses, self.evaluations, self.alarms, self._step_seconds, self._speeds):
            known.clear()
        self.last, self.num_alarms = {}, 0

    def _add(self, row: LiveRow) -> None:
        kind = row.get("kind")
        if kind == "train":
            self.last = row
            loss = value(row, "loss")
            self.losses.append(math.nan if loss is None else loss)
            for known, key in (
                (self._step_seconds, "step_time_seconds"),
                (self._speeds, "tokens_per_second"),
            ):
                if (found := value(row, key)) is not None:
                    known.append(found)
        elif kind == "eval":
            self.evaluations[str(row.get("selection"))] = row
        elif kind == "alarm":
            self.alarms.append(row)
            self.num_alarms += 1


def value(row: LiveRow, key: str) -> float | None:
    """A finite number of a row, or None."""
    found = row.get(key)
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return float(found)


def planned_steps(folder: Path) -> int | None:
    """Steps that a run's config plans, or None where it has none."""
    steps = (find_object(folder / "config.json") or {}).get("steps")
    return steps if isinstance(steps, int) and steps > 0 else None


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, begun or about to begin."""
    return (folder / METRICS).is_file() or planned_steps(folder) is not None


def find_runs(folder: Path) -> list[Path]:
    """The folder itself if it is a run's, or else the runs inside it, such as of a comparison.

    Raises:
        FileNotFoundError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder; give a run's folder, or that of a comparison"
        )
    found = [folder] if is_run(folder) else sorted(filter(is_run, _folders(folder)))
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no run: neither {METRICS} nor the config.json of one, here or one "
            "folder below"
        )
    return found


def _folders(folder: Path) -> list[Path]:
    return [child for child in folder.iterdir() if child.is_dir()]
