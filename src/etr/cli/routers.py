"""`etr routers`: what there is, with papers, flags and options."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from etr.cli._options import parse
from etr.moe import CAPACITIES, ROUTERS, support_table


@dataclass(frozen=True, kw_only=True)
class RoutersConfig:
    """What to list."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A router or capacity policy, to see its options."""


def run(arguments: list[str]) -> int:
    """Print the tables, or one row's options."""
    config = parse(RoutersConfig, "routers", arguments)
    console = Console()
    if config.name is None:
        for table in (router_table(), capacity_table(), cell_table()):
            console.print(table)
        return 0
    found = [table[config.name] for table in (ROUTERS, CAPACITIES) if config.name in table]
    if not found:
        names = ", ".join([*ROUTERS, *CAPACITIES])
        raise ValueError(f"name={config.name!r} is unknown; choose one of {names}")
    for kind in found:
        console.print(f"[bold]{kind.name}[/]  {inspect.getdoc(kind)}\n", highlight=False)
        for field in dataclasses.fields(kind):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            console.print(f"  {field.name} = {default!r}", highlight=False)
    return 0


def router_table() -> Table:
    """Routers with their traits."""
    table = Table(title="Routers")
    for name in ("name", "paper", "causal", "fixed load", "ranks by", "capacity", "what it is"):
        table.add_column(name)
    for name, kind in ROUTERS.items():
        traits = kind().traits
        table.add_row(
            name,
            kind.paper,
            _mark(traits.causal),
            _mark(traits.fixed_load),
            " or ".join(traits.rank_by),
            traits.default_capacity,
            kind.summary,
        )
    return table


def capacity_table() -> Table:
    """Capacity policies."""
    table = Table(title="Capacity policies")
    for name in ("name", "paper", "what it is"):
        table.add_column(name)
    for name, kind in CAPACITIES.items():
        table.add_row(name, kind.paper, kind.summary)
    return table


def cell_table() -> Table:
    """What goes with what; a refused cell says why when it is built."""
    table = Table(title="Router x capacity")
    table.add_column("router")
    for capacity in CAPACITIES:
        table.add_column(capacity)
    cells = support_table()
    for router in ROUTERS:
        table.add_row(router, *(_mark(cells[router, capacity] is None) for capacity in CAPACITIES))
    return table


def _mark(yes: bool) -> str:
    return "yes" if yes else "-"
