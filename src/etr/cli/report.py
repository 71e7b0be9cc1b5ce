"""`etr report`: draw the report of a finished comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from etr.cli._options import parse
from etr.report import load_results, terminal_table, write_report


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which comparison to draw."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the comparison, with results.json."""
    figures: bool = False
    """Also write each figure as SVG and PNG into the folder `figures`."""


def run(arguments: list[str]) -> int:
    """Print the table and write ``report.html``."""
    config = parse(ReportConfig, "report", arguments)
    folder = Path(config.run)
    console = Console()
    console.print(terminal_table(load_results(folder / "results.json"), console.width))
    page = write_report(
        folder / "results.json",
        folder / "report.html",
        figures_dir=folder / "figures" if config.figures else None,
    )
    print(f"report: {page}")
    return 0
