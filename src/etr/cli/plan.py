"""`etr plan`: which rank should hold which expert, from a trace."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from etr.cli._options import WithImports, parse
from etr.cli._progress import bytes_progress
from etr.cli._tables import make_table
from etr.cli._traces import same_model
from etr.files import write_json
from etr.model.transform import Renumber
from etr.report.chart import save_svg
from etr.report.hops import hops_chart
from etr.systems import PLANNERS, Demand, Devices, Plan, Travel, travel
from etr.systems.plan import Consecutive, RoundRobin
from etr.trace import Trace, TraceInfo, read_trace

log = logging.getLogger(__name__)
SHADES = " \N{LIGHT SHADE}\N{MEDIUM SHADE}\N{DARK SHADE}\N{FULL BLOCK}"
"""Of a heat map, from nothing to the most."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(WithImports):
    """What to plan by, and for which ranks."""

    name: Annotated[str, tyro.conf.Positional]
    """Planner, perhaps with options: consecutive, round_robin:by_load=true, exflow, moetuner."""
    trace: Annotated[str, tyro.conf.Positional]
    """File that etr trace wrote."""
    ranks: int
    """Ranks that hold experts; experts of a layer are divided among them evenly."""
    nodes: int = 1
    """Nodes that the ranks stand on."""
    out: str | None = None
    """JSON file of the plan; by default plan.json beside the trace. A picture of the traffic before
    and after stands beside it, plan.svg."""
    held_out: str | None = None
    """Another trace of the same model, on which the plan is measured too."""
    model: str | None = None
    """Model of the trace, a checkpoint or a run's folder, of which a renumbered one is made."""
    placed: str | None = None
    """New folder of the renumbered model; by default the model's with -placed behind its name."""

    def __post_init__(self) -> None:
        PLANNERS.parse(self.name)
        Devices(num_ranks=self.ranks, num_nodes=self.nodes)
        if Path(self.out or "").suffix == ".svg":
            raise ValueError(
                f"out={self.out!r} must be the JSON file of the plan, such as plan.json; the "
                "picture, plan.svg, is written beside it"
            )


def run(arguments: list[str]) -> int:
    """Plan, write the plan, and print what tokens travel before and after."""
    config = parse(PlanConfig, "plan", arguments)
    planner = PLANNERS.parse(config.name)
    trace = read_trace(config.trace)
    source = None if config.model is None else _model_of(trace.info, config.model)
    devices = Devices(num_ranks=config.ranks, num_nodes=config.nodes)
    log.info("placing %d layers of %d experts", trace.info.num_layers, trace.info.num_experts)
    demand = _demand(trace)
    plan = planner.plan(demand, devices, source=trace.info.source)
    placed = [
        ("consecutive", Consecutive().plan(demand, devices)),
        ("round robin", RoundRobin().plan(demand, devices)),
        ("plan", plan),
    ]
    found = [(name, travel(demand, each)) for name, each in placed]
    console = Console()
    console.print(summary(found))
    for name, moved in (found[0], found[-1]):
        console.print(heat_map(moved.flow, f"hops between ranks, {name}"))
    if config.held_out is not None:
        other = _demand(same_model(config.held_out, trace.info, "held_out"))
        console.print(
            summary([(f"{name}, held out", travel(other, each)) for name, each in placed])
        )
    out = Path(config.trace).parent / "plan.json" if config.out is None else Path(config.out)
    flows = {"before": found[0][1].flow.tolist(), "after": found[-1][1].flow.tolist()}
    write_json(out, {**plan.to_dict(), "hops_between_ranks": flows})
    picture = out.with_suffix(".svg")
    titles = ("before, consecutive", f"after, {config.name}")
    save_svg(hops_chart(dict(zip(titles, flows.values(), strict=True)), config.nodes), picture)
    print(f"{config.name} for {config.ranks} ranks: {out}, {picture}")
    if source is not None:
        _carry_out(plan, source, Path(config.placed or f"{str(config.model).rstrip('/')}-placed"))
    elif plan.is_even:
        print(f"carry it out: etr transform renumber SOURCE NEW_FOLDER --plan {out}")
    return 0


def _demand(trace: Trace) -> Demand:
    choices, sequence = map(torch.tensor, trace.choices())
    return Demand.of(choices, sequence, trace.info.num_experts)


def _model_of(info: TraceInfo, model: str) -> Path:
    """Folder of the model that was traced.

    Raises:
        ValueError: the trace is of another.
    """
    from etr.train.checkpoint_folder import find_model

    folder = find_model(model)
    if Path(info.source).resolve() != folder.resolve():
        raise ValueError(
            f"the trace is of the model in {info.source!r}, and model={model!r} is "
            f"{str(folder)!r}; trace that one: etr trace {model}"
        )
    return folder


def _carry_out(plan: Plan, source: Path, target: Path) -> None:
    """Write the renumbered model, and say what became of the function."""
    from etr.cli._text import print_made
    from etr.hf.transform import transform
    from etr.train.folders import making

    with making(target), bytes_progress("renumbering") as progress:
        report = transform(
            source, target, Renumber(), plan=plan.to_dict(), progress=progress, compare=True
        )
    print_made(report, "the source")


def heat_map(flow: torch.Tensor, title: str) -> Table:
    """Counts from each rank (row) to each rank (column), shaded by their share of the greatest."""
    size, most = len(flow), max(int(flow.max()), 1)
    table = make_table("from", *(str(rank) for rank in range(size)), title=title)
    for rank, row in enumerate(flow.tolist()):
        shades = (SHADES[round(value * (len(SHADES) - 1) / most)] for value in row)
        cells = (f"{shade * 2} {value:,}" for shade, value in zip(shades, row, strict=True))
        table.add_row(str(rank), *cells)
    return table


def summary(rows: list[tuple[str, Travel]]) -> Table:
    """What tokens travel under each placement, on this trace."""
    names = ("between ranks", "between nodes", "hops between ranks", "hops between nodes")
    table = make_table("placement", *names, "busiest rank", words=("placement",))
    for name, found in rows:
        shares = (
            (found.pairs_between_ranks, found.pairs),
            (found.pairs_between_nodes, found.pairs),
            (found.hops_between_ranks, found.hops),
            (found.hops_between_nodes, found.hops),
        )
        cells = [f"{part / whole:.1%}" if whole else "-" for part, whole in shares]
        table.add_row(name, *cells, f"{found.max_over_mean:.2f} of mean")
    return table
