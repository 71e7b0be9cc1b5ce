"""`etr report`: draw the report of runs and comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from etr.cli._options import parse
from etr.report import Report, load_report, terminal_table, write_report


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Which runs to draw."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs and of comparisons, in any mixture."""
    out: str | None = None
    """The page; by default report.html in the folder given, or in the current one for several."""
    figures: bool = False
    """Also write each figure as SVG and PNG into the folder `figures` beside the page."""
    title: str | None = None
    """Heading of the page."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs is empty; name at least one folder of a run or a comparison")


def run(arguments: list[str]) -> int:
    """Print the tables of comparisons and write ``report.html``."""
    config = parse(ReportConfig, "report", arguments)
    report = load_report([Path(name) for name in config.runs])
    _print_tables(report)
    page = Path(config.out) if config.out else _default_page(config.runs)
    write_report(
        report,
        page,
        title=config.title,
        figures_dir=page.parent / "figures" if config.figures else None,
    )
    print(f"report: {page}")
    return 0


def _print_tables(report: Report) -> None:
    console = Console()
    for part in report.parts:
        if part.name:
            console.print(part.name, markup=False, highlight=False)
        console.print(terminal_table(part.results, console.width))


def _default_page(runs: tuple[str, ...]) -> Path:
    folder = Path(runs[0]) if len(runs) == 1 else Path()
    return (folder.parent if folder.is_file() else folder) / "report.html"
