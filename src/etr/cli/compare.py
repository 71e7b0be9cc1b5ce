"""`etr compare`: several routers on the same work."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from etr.cli._options import parse
from etr.cli._progress import training_progress
from etr.report import terminal_table, write_report
from etr.train import CompareConfig, TrainResult, compare


def run(arguments: list[str]) -> int:
    """Compare, then print the table and write the report."""
    config = parse(CompareConfig, "compare", arguments)
    command = shlex.join(["etr", "compare", *arguments])
    return 130 if run_comparison(config, command) is None else 0


def run_comparison(
    config: CompareConfig, command: str, keep: list[TrainResult] | None = None
) -> dict[str, Any] | None:
    """Run, print the table, write ``report.html``.

    Args:
        config: what to compare.
        command: how to repeat it.
        keep: receives the trained models.
    Returns:
        The results, or None if stopped.
    """
    with training_progress(config.run.steps) as progress:
        results = compare(
            config,
            command=command,
            on_step=lambda name, seed, row: progress.step(f"{name} {seed}", row),
            on_result=lambda result: None if keep is None else keep.append(result),
        )
    out = Path(config.run.out)
    if results is None:
        print(f"stopped; the same command goes on where it stopped ({out})")
        return None
    console = Console()
    console.print(terminal_table(results, console.width))
    page = write_report(out / "results.json", out / "report.html")
    print(f"results: {out / 'results.json'}\nreport:  {page}")
    return results
