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
from etr.cli._tables import make_table
from etr.files import write_json
from etr.systems import PLANNERS, Demand, Devices, Travel, travel
from etr.systems.plan import Consecutive
from etr.trace import read_trace

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(WithImports):
    """What to plan by, and for which ranks."""

    name: Annotated[str, tyro.conf.Positional]
    """Planner, perhaps with options: consecutive, round_robin:by_load=true."""
    trace: Annotated[str, tyro.conf.Positional]
    """File that etr trace wrote."""
    ranks: int
    """Ranks that hold experts; experts of a layer are divided among them evenly."""
    nodes: int = 1
    """Nodes that the ranks stand on."""
    out: str | None = None
    """JSON file of the plan; by default plan.json beside the trace."""

    def __post_init__(self) -> None:
        PLANNERS.parse(self.name)
        Devices(num_ranks=self.ranks, num_nodes=self.nodes)


def run(arguments: list[str]) -> int:
    """Plan, write the plan, and print what tokens travel before and after."""
    config = parse(PlanConfig, "plan", arguments)
    planner = PLANNERS.parse(config.name)
    trace = read_trace(config.trace)
    choices, sequence = map(torch.tensor, trace.choices())
    demand = Demand.of(choices, sequence, trace.info.num_experts)
    devices = Devices(num_ranks=config.ranks, num_nodes=config.nodes)
    log.info("placing %d layers of %d experts", trace.info.num_layers, trace.info.num_experts)
    plan = planner.plan(demand, devices, source=trace.info.source)
    out = Path(config.trace).parent / "plan.json" if config.out is None else Path(config.out)
    write_json(out, plan.to_dict())
    before = Consecutive().plan(demand, devices)
    Console().print(
        summary([("consecutive", travel(demand, before)), ("plan", travel(demand, plan))])
    )
    print(f"{config.name} for {config.ranks} ranks: {out}")
    if plan.is_even:
        print(f"carry it out: etr transform renumber SOURCE NEW_FOLDER --plan {out}")
    return 0


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
