"""`etr study`: the quality study, from runs to page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from etr.cli._of_run import command_line
from etr.cli._options import WithImports, parse
from etr.cli._studies import run_study
from etr.files import read_json
from etr.methods import told_to_import
from etr.recipes.study import FULL, SMOKE
from etr.study.run import Run, execute
from etr.study.study import StudyRunner
from etr.train import TrainConfig
from etr.train.folders import writing

SAME = 0.01
"""Nats within which a replay counts as the same: other processors add in another order, and
training carries the last bits far."""


@dataclass(frozen=True, kw_only=True)
class StudyCommand(WithImports):
    """Run what is missing, then write the page."""

    out: str = "runs/study"
    """Folder of results, figures and page."""
    weights: str | None = None
    """Folder of trained weights, for timing and diagnostics. None: `weights` in `out`."""
    smoke: bool = False
    """The whole path on a few steps, for tests and not for conclusions."""
    blocks: tuple[str, ...] = ()
    """Blocks to run; all where none is named. A matched block needs those before it."""
    workers: int = 2
    """Runs side by side, one thread each."""
    replay: str | None = None
    """Result file of a run: train it again from its stored config and compare the losses."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")


def run(arguments: list[str]) -> int:
    """Replay one run, or run the study."""
    command = parse(StudyCommand, "study", arguments)
    with writing(Path(command.out)):
        if command.replay is not None:
            return _replay(Path(command.replay), Path(command.out))
        return _study(command, command_line("study", arguments))


def _study(command: StudyCommand, again: str) -> int:
    study = SMOKE if command.smoke else FULL
    out = Path(command.out)
    weights = Path(command.weights) if command.weights else out / "weights"
    runner = StudyRunner(
        study=study, out=out, weights=weights, workers=command.workers, imports=command.imports
    )
    return run_study(runner, command.blocks, again)


def _replay(path: Path, out: Path) -> int:
    if not path.exists():
        raise FileNotFoundError(f"replay={str(path)!r} does not exist")
    stored = read_json(path)
    with told_to_import(str(path), stored["config"].get("imports", ())):
        run, config = Run(**stored["run"]), TrainConfig.from_dict(stored["config"])
    result = execute(run, out / "replay", config=config)
    before, now = stored["final"]["served_loss"], result["final"]["served_loss"]
    print(f"{run.row}, seed {run.seed}: held-out loss {now:.6f}, stored {before:.6f}")
    if abs(now - before) <= SAME:
        return 0
    print(f"they differ by more than {SAME}; the stored one was made with {stored['environment']}")
    return 1
