"""All results of a study in one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etr.files import read_json
from etr.study.grid import Match
from etr.study.summary import RunResult, StudyRow, rows_of

TIMES = "times.json"


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Rows by block, blocks' tasks, and step times by task."""

    blocks: dict[str, tuple[str, Match, tuple[StudyRow, ...]]]
    """Name of a block to its task, kind of match and rows."""
    times: dict[str, dict[str, Any]]
    """Name of a task to what `step_times` returned."""

    def rows(self, block: str) -> tuple[StudyRow, ...]:
        """Rows of a block; empty where it was not run."""
        return self.blocks[block][2] if block in self.blocks else ()

    def row(self, task: str, name: str) -> StudyRow | None:
        """A row at equal steps: the one with most seeds, from whichever block has it."""
        found = [
            row
            for of, match, rows in self.blocks.values()
            for row in rows
            if of == task and match == "steps" and row.name == name
        ]
        merged: dict[int, dict[int, RunResult]] = {}
        for row in found:
            by_seed = merged.setdefault(row.steps, {})
            by_seed.update({result["run"]["seed"]: result for result in row.results})
        if not merged:
            return None
        # Those with most seeds: a long run is another comparison.
        results = max(merged.values(), key=len)
        return StudyRow(name=name, results=tuple(results[seed] for seed in sorted(results)))

    def base(self, block: str, reference: str) -> StudyRow | None:
        """What the rows of a block are compared with: its own reference row, or the task's."""
        task, match, rows = self.blocks[block]
        own = [row for row in rows if row.name == reference and match == "steps"]
        others = {row.name for row in rows} - {reference}
        return own[0] if own and others else self.row(task, reference)

    def seconds(self, task: str, name: str) -> float | None:
        """Mean step time of a row over the reference's, as measured interleaved."""
        row = self.times.get(task, {}).get("rows", {}).get(name)
        return None if row is None else float(row["mean_ratio"])


def collect(
    folder: Path, blocks: Sequence[tuple[str, str, Match, Sequence[RunResult]]]
) -> Collection:
    """Put results of blocks and the times beside them together.

    Args:
        folder: of the results; ``TASK/times.json`` is read where it exists.
        blocks: name, task, match, results of each block.
    """
    times = {}
    for _, task, _, _ in blocks:
        path = folder / task / TIMES
        if path.exists():
            times[task] = read_json(path)
    return Collection(
        blocks={name: (task, match, tuple(rows_of(found))) for name, task, match, found in blocks},
        times=times,
    )


def measured_with(study: Collection) -> str:
    """A page's line on versions, machine, threads and text; empty without results."""
    every = [
        result["environment"]
        for _, _, rows in study.blocks.values()
        for row in rows
        for result in row.results
    ]
    if not every:
        return ""
    found, texts = every[0], sorted({one["corpus"] for one in every if one.get("corpus")})
    corpora = f" Text: corpus {', '.join(texts)}." if texts else ""
    return (
        f"Measured with torch {found['torch']}, Python {found['python']}, "
        f"{found['machine']}, {found['threads']} thread per run.{corpora}\n"
    )
