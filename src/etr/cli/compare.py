"""`etr compare`: several routers on the same work."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from etr.cli._of_run import command_line
from etr.cli._options import WithImports, parse
from etr.cli._progress import training_progress
from etr.cli._studies import run_study
from etr.report import terminal_table, write_report
from etr.study.study import StudyRunner
from etr.train import CompareConfig, compare, parse_variant
from etr.train.folders import writing


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Which comparison; a part of `CompareCommand`."""

    preset: Literal["rivals", "winner"] | None = None
    """A comparison that the library plans, in place of variants; hours. rivals: every router on the
    shelf against its own reference, on two tasks. winner: forms of etr, as they are served. Its own
    options: --preset rivals --help."""


@dataclass(frozen=True, kw_only=True)
class CompareCommand(Preset):
    """Variants, seeds, and the run they share; or a preset."""

    comparison: CompareConfig = field(default_factory=CompareConfig)
    """What to compare."""


@dataclass(frozen=True, kw_only=True)
class PresetCommand(WithImports):
    """A comparison as the library plans it: run what is missing, then write its page."""

    out: str | None = None
    """Folder of results, figures and page; by default runs and the preset's name."""
    smoke: bool = False
    """The whole path on a few steps, for tests and not for conclusions."""
    workers: int = 2
    """Runs side by side, one thread each."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")


def _preset(name: str, command: PresetCommand, again: str) -> int:
    from etr.recipes import rivals, winner
    from etr.study.rivals import RivalsRunner
    from etr.study.winner import WinnerRunner

    out = Path(command.out or f"runs/{name}")
    same: dict[str, Any] = {
        "out": out,
        "weights": out / "weights",
        "workers": command.workers,
        "imports": command.imports,
    }
    runner: StudyRunner
    if name == "rivals":
        study = rivals.smoke() if command.smoke else rivals.rivals()
        runner = RivalsRunner(study=study, claimed=rivals.CLAIMED, **same)
    else:
        study = winner.smoke() if command.smoke else winner.winner()
        beside = tuple(parse_variant(text).name for text in winner.BESIDE)
        runner = WinnerRunner(study=study, beside=beside, **same)
    with writing(out):
        return run_study(runner, (), again)


def run(arguments: list[str]) -> int:
    """Compare, then print the table and write the report; a preset is a study of its own."""
    asked, rest = tyro.cli(Preset, args=arguments, return_unknown_args=True, add_help=False)
    again = command_line("compare", arguments)
    if asked.preset is not None:
        command = parse(PresetCommand, f"compare --preset {asked.preset}", rest)
        return _preset(asked.preset, command, again)
    config = parse(CompareCommand, "compare", arguments).comparison
    said = shlex.join(["etr", "compare", *arguments])
    return 130 if run_comparison(config, said, again) is None else 0


def run_comparison(config: CompareConfig, command: str, again: str) -> dict[str, Any] | None:
    """Run, print the table, write ``report.html``.

    Args:
        config: what to compare.
        command: how to repeat it, for the report.
        again: how to go on after Ctrl-C.
    Returns:
        The results, or None if stopped.
    """
    with training_progress(config.run.steps) as progress:
        results = compare(
            config,
            command=command,
            on_step=lambda name, seed, row: progress.step(f"{name} {seed}", row),
        )
    out = Path(config.run.out)
    if results is None:
        print(f"stopped; go on with:\n{again}")
        return None
    console = Console()
    console.print(terminal_table(results, console.width))
    page = write_report(out / "results.json", out / "report.html")
    print(f"results: {out / 'results.json'}\nreport:  {page}")
    return results
