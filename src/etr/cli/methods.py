"""`etr methods`: what is on the shelf, with papers, flags, claims and options."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from etr.cli._options import WithImports, parse
from etr.cli._tables import make_table
from etr.field_notes import field_notes
from etr.files import write_text
from etr.methods import METHODS, Card
from etr.moe import CAPACITIES, ROUTERS, support_table
from etr.report.criteria import CHANGED, FAILS, NEVER, statuses
from etr.report.methods import by_seam, methods_page, yes_or_no

SHORT = {FAILS: "fails", CHANGED: "changed", NEVER: "not run"}
"""What a narrow column says of a criterion that was not met on today's code."""


@dataclass(frozen=True, kw_only=True)
class MethodsConfig(WithImports):
    """What to list."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A method, router or capacity policy, to see its claim and options."""
    page: str | None = None
    """Write the page of all methods to this file instead, in Markdown."""


def run(arguments: list[str]) -> int:
    """Print the tables, or one method, or write the page."""
    config = parse(MethodsConfig, "methods", arguments)
    if config.page is not None:
        write_text(Path(config.page), methods_page(statuses()))
        print(f"written: {config.page}")
        return 0
    console = Console()
    if config.name is not None:
        _show(console, config.name)
        return 0
    tables = (*method_tables(), other_table(), trait_table(), capacity_table(), cell_table())
    for table in tables:
        console.print(table, "")
    console.print("claim and options of a row: etr methods NAME", highlight=False)
    return 0


def _show(console: Console, name: str) -> None:
    """Print a card, and every router or policy of the name or among the card's rows."""
    card = METHODS.get(name)
    tables: tuple[Mapping[str, Any], ...] = (ROUTERS, CAPACITIES)
    kinds = [table[name] for table in tables if name in table]
    if card is not None:
        kinds = list(dict.fromkeys((*(row.kind for row in card.rows), *kinds)))
        console.print(Text(f"{card.name}: {card.title}\n", style="bold"))
        console.print(Padding(card_table(card), (0, 0, 1, 2)))
    elif not kinds:
        names = ", ".join(dict.fromkeys((*METHODS, *ROUTERS, *CAPACITIES)))
        raise ValueError(f"name={name!r} is unknown; choose one of {names}")
    for kind in kinds:
        _show_options(console, kind)


def card_table(card: Card) -> Table:
    """What a card says, one fact a line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    facts = {
        "does": card.summary,
        "paper": f"arXiv {card.paper}" if card.paper else "",
        "kind": f"{card.level}, {card.branch}",
        "sets" if card.options else "runs": card.command,
        "claim": card.claim,
        "status": statuses()[card.name],
        "departs": card.departs,
        "against": card.rival,
        "may move": ", ".join(card.moves),
        "causal": yes_or_no(card.causal),
        "fixed load": yes_or_no(card.fixed_load),
        "looks at": "its own rank's tokens" if card.ranks == "own" else "",
    }
    for what, said in facts.items():
        if said:
            grid.add_row(Text(what, style="dim"), Text(said))
    return grid


def _show_options(console: Console, kind: Any) -> None:
    console.print(Text(f"{kind.name}: {inspect.getdoc(kind)}\n"))
    notes = field_notes(kind)
    for field in dataclasses.fields(kind):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        console.print(Text(f"  {field.name} = {default!r}"))
        console.print(Padding(Text(notes.get(field.name, "")), (0, 0, 0, 6)))
    console.print()


def method_tables() -> list[Table]:
    """Methods, a table for each seam."""
    status = statuses()
    tables = []
    for seam, cards in by_seam().items():
        table = _table(f"Methods: {seam}", "name", "paper", "what it does", "status")
        for column in (table.columns[0], table.columns[1], table.columns[3]):
            column.no_wrap = True  # what it does takes the room that is left
        for card in cards:
            papers = card.paper.replace(", ", "\n")
            table.add_row(card.name, papers, card.summary, SHORT.get(status[card.name], "works"))
        tables.append(table)
    return tables


def other_table() -> Table:
    """Routers that are nobody's published method."""
    table = _table("Other routers", "name", "what it is")
    carded = {row.kind for card in METHODS.values() for row in card.rows}
    for name, kind in ROUTERS.items():
        if kind not in carded:
            table.add_row(name, kind.summary)
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
