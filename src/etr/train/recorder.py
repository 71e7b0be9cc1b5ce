"""Where a run's rows go: its file and the trackers; the alarms they raise follow them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from etr.train.alarms import Alarms, MetricsRow
from etr.train.folders import METRICS
from etr.train.metrics import MetricsFile, read_metrics
from etr.train.trackers import open_trackers, scalars

COUNTERS = ("step", "tokens", "expert_flops", "elapsed_seconds")
"""What every row begins with, beside its kind."""


class Recorder:
    """Writes the rows of one run.

    Args:
        run: folder of the run, which exists.
        after_step: steps done when a run goes on; rows of later steps are removed.
        alarms: fresh ones; they catch up on the rows that are there.
        trackers: names of trackers to write to as well.
    """

    def __init__(
        self, run: Path, after_step: int, alarms: Alarms, trackers: tuple[str, ...]
    ) -> None:
        path = run / METRICS
        self._file = MetricsFile(path, after_step=after_step)
        self._alarms = alarms
        for row in read_metrics(path):
            alarms.update(row)
        self._trackers = open_trackers(trackers, run, after_step)

    def write(self, row: MetricsRow) -> list[MetricsRow]:
        """Write a row, and after it a row for each alarm that it raises; returns all of them."""
        counters = {name: row[name] for name in COUNTERS}
        rows = [row] + [
            {"kind": "alarm", **counters, **dataclasses.asdict(alarm)}
            for alarm in self._alarms.update(row)
        ]
        for each in rows:
            self._file.write(each)
            for tracker in self._trackers:
                tracker.log(scalars(each), step=each["step"])
        return rows

    def close(self) -> None:
        """Close the file and end the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.finish()
