"""`etr compare`: several routers on the same work."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from etr.cli._of_run import command_line
from etr.cli._options import parse
from etr.cli._progress import training_progress
from etr.report import terminal_table, write_report
from etr.train import CompareConfig, compare


def run(arguments: list[str]) -> int:
    """Compare, then print the table and write the report."""
    config = parse(CompareConfig, "compare", arguments)
    command = shlex.join(["etr", "compare", *arguments])
    again = command_line("compare", arguments)
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
