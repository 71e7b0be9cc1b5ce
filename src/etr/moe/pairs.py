"""Which rows of two tables go together: found by making a config of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from etr.moe.capacity import CAPACITIES
from etr.moe.config import MoEConfig
from etr.moe.experts import BANKS
from etr.moe.losses import LOSSES
from etr.moe.routers import ROUTERS
from etr.moe.table import Table

TABLES: dict[str, Table[Any]] = {
    "router": ROUTERS,
    "capacity": CAPACITIES,
    "losses": LOSSES,
    "experts": BANKS,
}
"""Tables by the option of a layer that names their rows."""
# The width is a multiple of the choices of every bank.
SIZES: dict[str, Any] = {"hidden_size": 40, "intermediate_size": 8, "num_experts": 4}


def pair_config(**options: str) -> MoEConfig:
    """A config with these rows at their default options, losses with a weight.

    Where no router is named it is the first that goes with the others.

    Args:
        options: name of a row by the name of its option.
    Raises:
        ValueError: they do not go together.
    """
    given: dict[str, Any] = dict(options)
    if "losses" in given:
        given["losses"] = f"{given['losses']}:weight=0.1"
    top_k = BANKS.parse(given.get("experts", "uniform")).choices_of_a_token or 1
    problems = []
    for router in [given.pop("router")] if "router" in given else ["token_choice", *ROUTERS]:
        try:
            return MoEConfig(**SIZES, top_k=top_k, router=router, **given)
        except ValueError as problem:
            problems.append(problem)
    raise problems[0]


def pair_table(one: str, other: str) -> dict[tuple[str, str], str | None]:
    """Every row of a table with every row of another: None if they go together, else the reason.

    Args:
        one, other: keys of `TABLES`.
    """
    return {(a, b): _reason(**{one: a, other: b}) for a in TABLES[one] for b in TABLES[other]}


def pairs() -> Iterator[tuple[str, str]]:
    """Every two tables once."""
    names = list(TABLES)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            yield one, other


def _reason(**options: str) -> str | None:
    try:
        pair_config(**options)
    except ValueError as problem:
        return str(problem)
    return None
