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
from etr.train import CompareConfig, compare
from etr.train.folders import writing


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Which comparison; a part of `CompareCommand`."""

    preset: Literal["rivals"] | None = None
    """A comparison that the library plans, in place of variants. rivals: every router on the shelf
    against its own reference, on two tasks; hours. Its own options: --preset rivals --help."""


@dataclass(frozen=True, kw_only=True)
class CompareCommand(Preset):
    """Variants, seeds, and the run they share; or a preset."""

    comparison: CompareConfig = field(default_factory=CompareConfig)
    """What to compare."""


@dataclass(frozen=True, kw_only=True)
class PresetCommand(WithImports):
    """A comparison as the library plans it: run what is missing, then write its page."""

    out: str = "runs/rivals"
    """Folder of results, figures and page."""
    smoke: bool = False
    """The whole path on a few steps, for tests and not for conclusions."""
    workers: int = 2
    """Runs side by side, one thread each."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")


def _preset(command: PresetCommand, again: str) -> int:
    from etr.recipes.rivals import CLAIMED, rivals, smoke
    from etr.study.rivals import RivalsRunner

    out = Path(command.out)
    runner = RivalsRunner(
        study=smoke() if command.smoke else rivals(),
        out=out,
        weights=out / "weights",
        workers=command.workers,
        imports=command.imports,
        claimed=CLAIMED,
    )
    with writing(out):
        return run_study(runner, (), again)


def run(arguments: list[str]) -> int:
    """Compare, then print the table and write the report; a preset is a study of its own."""
    asked, rest = tyro.cli(Preset, args=arguments, return_unknown_args=True, add_help=False)
    again = command_line("compare", arguments)
    if asked.preset is not None:
        return _preset(parse(PresetCommand, f"compare --preset {asked.preset}", rest), again)
    config = parse(CompareCommand, "compare", arguments).comparison
    command = shlex.join(["etr", "compare", *arguments])
    return 130 if run_comparison(config, command, again) is None else 0


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
