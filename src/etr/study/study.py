"""A whole study: blocks one after another, times in between, and the page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from etr.files import read_json, write_json, write_text
from etr.study import figures, markdown
from etr.study.collection import TIMES, Collection, collect
from etr.study.grid import Block, Match, flops_ratio, runs_of
from etr.study.measure import measure
from etr.study.queue import load, run_all
from etr.study.run import Run, load_model
from etr.study.timing import step_times
from etr.train import parse_variant

Show = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Study:
    """Blocks in the order in which they run; a matched block needs the blocks before it."""

    blocks: tuple[Block, ...]
    """What is run."""
    reference: str
    """Row that others are compared with, and that matched rows are matched to."""
    references: Mapping[str, str] = field(default_factory=dict)
    """Rows that have another reference, by row."""
    timing_rounds: int = 48
    """Rounds of the interleaved timing."""

    def reference_of(self, row: str) -> str:
        """Name of the row that a row is compared with."""
        return self.references.get(row, self.reference)

    def block(self, name: str) -> Block:
        """The block of a name.

        Raises:
            ValueError: there is none.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        known = ", ".join(block.name for block in self.blocks)
        raise ValueError(f"block {name!r} is unknown; choose from {known}")

    def still_to_run(self, found: Collection) -> str:
        """A page's line on the runs that it does not have yet; empty where it has all."""
        left = []
        for block in self.blocks:
            runs = len(block.variants) * len(block.seeds)
            done = sum(len(row.results) for row in found.rows(block.name))
            if done < runs:
                left.append(f"{block.name} ({done} of {runs})")
        if not left:
            return ""
        return (
            f"**Not all of it has been run**: {'; '.join(left)}. The same command goes on where it "
            "stopped. Intervals and corrections are those of the runs that there are.\n"
        )


@dataclass(frozen=True, kw_only=True)
class StudyRunner:
    """Runs a study into a folder: ``quality/`` (results), ``images/``, and ``quality.md``."""

    name: ClassVar[str] = "quality"
    """Of the page and of the folder of results."""

    study: Study
    """What to run."""
    out: Path
    """The folder."""
    weights: Path
    """Folder of trained weights, for timing and diagnostics."""
    workers: int = 2
    """Runs side by side."""
    imports: tuple[str, ...] = ()
    """Python files with methods of one's own, which every worker runs."""

    @property
    def results(self) -> Path:
        """Folder of the raw results."""
        return self.out / self.name

    def run(self, names: Sequence[str], show: Show) -> Path:
        """Run the named blocks (all where none is named) in the study's order; write the page.

        Args:
            names: of blocks, in any order: a matched one needs those before it in the study.
            show: called with a block's name, its steps done and its steps in all.
        """
        chosen = {self.study.block(name) for name in names} or set(self.study.blocks)
        wanted = [block for block in self.study.blocks if block in chosen]
        for block in wanted:
            if block.match == "seconds" and not set(block.rows) <= set(self.times(block)):
                self.time(block)
            runs = self.runs(block)
            self._run_block(block, runs, show)
            if block.diagnostics:
                self._measure(runs)
        return self.write_page()

    def runs(self, block: Block) -> list[Run]:
        """The runs of a block; a matched one is worked out from the blocks before it."""
        return runs_of(block, lambda variant, match: self._cost(block, variant, match))

    def write_page(self) -> Path:
        """Write the page and its figures from what results there are."""
        path = self.out / f"{self.name}.md"
        write_text(path, self.page(self.collected()))
        return path

    def collected(self) -> Collection:
        """What results there are."""
        found = []
        for block in self.study.blocks:
            try:
                runs = self.runs(block)
            except ValueError:
                continue  # what it is matched to has not been run
            results = [result for run in runs if (result := load(run, self.results)) is not None]
            found.append((block.name, block.task, block.match, results))
        return collect(self.results, found)

    def page(self, study: Collection) -> str:
        """The page; figures are written on the way."""
        images = figures.draw(study, self.study.reference, self.out / "images")
        notes = self.out / "quality-notes.md"
        return markdown.page(
            study,
            self.study.reference,
            {title: f"images/{path.name}" for title, path in images.items()},
            notes.read_text(encoding="utf-8") if notes.exists() else "",
        )

    def measures(self, run: Run) -> dict[str, Any]:
        """Diagnostics of a run's trained model."""
        return measure(run, load_model(run, self.weights))

    def _run_block(self, block: Block, runs: list[Run], show: Show) -> None:
        total = sum(run.steps for run in runs)
        ready = sum(run.steps for run in runs if load(run, self.results) is not None)

        def progress(steps: dict[Run, int]) -> None:
            show(block.name, ready + sum(steps.values()), total)

        progress({})
        run_all(
            runs,
            self.results,
            weights=self.weights,
            workers=self.workers,
            imports=self.imports,
            on_progress=progress,
        )
        show(block.name, total, total)

    def _measure(self, runs: Sequence[Run]) -> None:
        """Add the diagnostics that need the trained weights to results that lack them."""
        for run in runs:
            result = load(run, self.results)
            if result is not None and "measures" not in result:
                result["measures"] = self.measures(run)
                write_json(run.path(self.results), result)

    def _cost(self, block: Block, variant: str, match: Match) -> float:
        name = parse_variant(variant).name
        reference = self._equal_steps(block, self.study.reference_of(name))
        row = self._equal_steps(block, name)
        if match == "expert_flops":
            return flops_ratio(self._load_all(row), self._load_all(reference))
        return self._time_ratio(block, row[0].row)

    def _equal_steps(self, block: Block, name: str) -> list[Run]:
        """Runs of a row in an earlier block of equal steps on the same task."""
        for earlier in self.study.blocks:
            same = earlier.task == block.task and earlier.steps == block.steps
            if same and earlier.match == "steps" and earlier.seeds[0] == block.seeds[0]:
                runs = [run for run in runs_of(earlier, lambda *_: 1.0) if run.row == name]
                if runs:
                    return runs
        raise ValueError(f"block {block.name!r}: no block runs {name!r} at equal steps before it")

    def _load_all(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        found = [load(run, self.results) for run in runs]
        if None in found:
            raise ValueError(
                f"row {runs[0].row!r} on {runs[0].task!r} has runs missing; run its block first"
            )
        return [result for result in found if result is not None]

    def _time_ratio(self, block: Block, name: str) -> float:
        """Step time over the reference's, from the block's timing file."""
        times = self.times(block)
        if name not in times:
            raise ValueError(f"step times of {name!r} on {block.task!r} have not been measured")
        return float(times[name]["mean_ratio"])

    def times_file(self, block: Block) -> Path:
        """Where step times of a block's rows are kept: one file a task."""
        return self.results / block.task / TIMES

    def times(self, block: Block) -> dict[str, Any]:
        """Step times of a block's rows, by row; empty before they are measured."""
        path = self.times_file(block)
        return dict(read_json(path)["rows"]) if path.exists() else {}

    def time(self, block: Block) -> None:
        """Measure the step times of every timed row of a block's task, interleaved; keep them."""
        task = block.task
        blocks = [x for x in self.study.blocks if x.task == task and x.match == "seconds"]
        names = [self.study.reference, *(row for one in blocks for row in one.rows), *TIMED_TOO]
        runs = self.first_runs(blocks[0], names)
        times = step_times(runs, self.weights, rounds=self.study.timing_rounds)
        write_json(self.times_file(block), times)

    def first_runs(self, block: Block, names: Sequence[str]) -> list[Run]:
        """The first seed's run at equal steps of each row that is run on the block's task.

        Raises:
            ValueError: a run is missing.
        """
        runs = []
        for name in dict.fromkeys(names):
            with contextlib.suppress(ValueError):  # the row is not run on this task
                runs.append(self._equal_steps(block, name)[0])
        self._load_all(runs)
        return runs


TIMED_TOO = ("baseline", "locmoe", "etr_paper")
"""Rows that the papers' claims about time speak of."""
