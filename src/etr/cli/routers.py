"""`etr routers`: what there is, with papers, flags and options."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from etr.cli._options import parse
from etr.cli._tables import make_table
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
        for table in (router_table(), trait_table(), capacity_table(), cell_table()):
            console.print(table)
        console.print("options of a row: etr routers NAME", highlight=False)
        return 0
    found = [table[config.name] for table in (ROUTERS, CAPACITIES) if config.name in table]
    if not found:
        names = ", ".join([*ROUTERS, *CAPACITIES])
        raise ValueError(f"name={config.name!r} is unknown; choose one of {names}")
    for kind in found:
        console.print(Text(f"{kind.name}: {inspect.getdoc(kind)}\n"))
        notes = field_notes(kind)
        for field in dataclasses.fields(kind):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            console.print(Text(f"  {field.name} = {default!r}\n      {notes.get(field.name, '')}"))
    return 0


def field_notes(kind: type) -> dict[str, str]:
    """What the line under each field of a config says."""
    notes: dict[str, str] = {}
    for owner in reversed([c for c in kind.__mro__ if dataclasses.is_dataclass(c)]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in itertools.pairwise(body.body):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            match text:
                case ast.Expr(value=ast.Constant(value=str(said))):
                    notes[field.target.id] = " ".join(said.split())
    return notes


def router_table() -> Table:
    """Routers, and where they are from."""
    table = _table("Routers", "name", "paper", "what it is")
    for name, kind in ROUTERS.items():
        table.add_row(name, kind.paper, kind.summary)
    return table


def trait_table() -> Table:
    """What routers are and can do, at their default options."""
    table = _table("Traits", "name", "causal", "fixed load", "ranks by", "default capacity")
    for name, kind in ROUTERS.items():
        traits = kind().traits
        table.add_row(
            name,
            _mark(traits.causal),
            _mark(traits.fixed_load),
            " or ".join(traits.rank_by),
            traits.default_capacity,
        )
    return table


def capacity_table() -> Table:
    """Capacity policies."""
    table = _table("Capacity policies", "name", "paper", "what it is")
    for name, kind in CAPACITIES.items():
        table.add_row(name, kind.paper, kind.summary)
    return table


def cell_table() -> Table:
    """What goes with what; a refused cell says why when it is built."""
    table = _table("Router x capacity", "name", *CAPACITIES)
    cells = support_table()
    for router in ROUTERS:
        table.add_row(router, *(_mark(cells[router, capacity] is None) for capacity in CAPACITIES))
    return table


def _table(title: str, *columns: str) -> Table:
    return make_table(*columns, words=columns, title=title)


def _mark(yes: bool) -> str:
    return "yes" if yes else "-"
