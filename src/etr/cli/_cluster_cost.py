"""The parts of `etr cluster` that predict: plan, paper, calibrate, scale."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from etr.cli._options import parse
from etr.cli._tables import make_table
from etr.cluster.bench.plan import BenchConfig
from etr.cluster.calibration import calibrate, section
from etr.cluster.cost import chrome_trace, draw
from etr.cluster.figure import timeline
from etr.cluster.paper import tried
from etr.cluster.paper_page import page as paper_page
from etr.cluster.paper_page import tornado
from etr.cluster.plan import HEAD, PlanConfig, Planned, cells, part_cells
from etr.cluster.plan import plan as find_plan
from etr.cluster.scale import ScaleConfig
from etr.cluster.scale import page as scale_page
from etr.files import read_json, write_json, write_text
from etr.report.chart import save_svg

TORNADO = "images/paper-clusters-tornado.svg"
"""Beside the page of the paper's clusters."""


def plan(arguments: list[str]) -> int:
    """Print tables and a timeline; write both for programs."""
    config = parse(PlanConfig, "cluster plan", arguments)
    model, cluster, found = find_plan(config)
    console, out = Console(), Path(config.out)
    print(f"predicted: {model.name} on {cluster.num_devices} devices, {cluster.name}")
    console.print(_table(HEAD, cells(found)))
    console.print(_table(("seconds", *(one.routing.name for one in found)), part_cells(found)))
    end = max(one.steps[-1].seconds for one in found)
    for one in found:
        print(f"\n{one.routing.name}, at the end of training: {one.steps[-1].seconds:.3f} s")
        print(draw(one.steps[-1].events, end_seconds=end))
    print("F forward  B backward  r gradient reduction  o optimizer  . waits")
    write_json(out / "plan.json", [_values(one) for one in found])
    steps = {one.routing.name: one.steps[-1].events for one in found}
    write_json(out / "trace.json", chrome_trace(steps))
    save_svg(timeline(steps), out / "timeline.svg")
    print(f"written: {out}/plan.json, {out}/trace.json, {out}/timeline.svg")
    return 0


def _table(head: tuple[str, ...], rows: list[list[str]]) -> Any:
    made = make_table(*head, words=head[:2] if head is HEAD else head[:1])
    for row in rows:
        made.add_row(*row)
    return made


def _values(one: Planned) -> dict[str, Any]:
    return {
        "label": "predicted",
        "routing": dataclasses.asdict(one.routing),
        "layout": dataclasses.asdict(one.layout),
        "seconds": one.seconds,
        "parts_seconds": one.parts(),
        "memory": dataclasses.asdict(one.memory),
    }


@dataclass(frozen=True, kw_only=True)
class PaperCommand:
    """Predict the paper's clusters, beside what the paper reports."""

    page: str | None = None
    """Markdown file to write, e.g. docs/results/paper-clusters.md. None: print it."""


def paper(arguments: list[str]) -> int:
    """The paper's clusters."""
    command, found = parse(PaperCommand, "cluster paper", arguments), tried()
    if command.page is None:
        return _write(paper_page(found), None)
    save_svg(tornado(found), Path(command.page).parent / TORNADO)
    return _write(paper_page(found, TORNADO), command.page)


@dataclass(frozen=True, kw_only=True)
class CalibrateCommand:
    """Fit the cost model to measured steps, and say how far it is from those kept out."""

    results: str = "docs/results/cluster.json"
    """Results of etr cluster bench."""
    out: str | None = None
    """JSON file for the fitted values. None: none is written."""


def calibrate_steps(arguments: list[str]) -> int:
    """Fit, print, write."""
    command = parse(CalibrateCommand, "cluster calibrate", arguments)
    found = calibrate(read_json(Path(command.results)), BenchConfig())
    if command.out is not None:
        write_json(Path(command.out), dataclasses.asdict(found.fitted))
    return _write(section(found), None)


def scale(arguments: list[str]) -> int:
    """Simulate thousands of devices."""
    config = parse(ScaleConfig, "cluster scale", arguments)
    return _write(scale_page(config, read_json(Path(config.results))), config.page)


def _write(text: str, page: str | None) -> int:
    if page is None:
        print(text)
    else:
        write_text(Path(page), text)
        print(f"written: {page}")
    return 0
