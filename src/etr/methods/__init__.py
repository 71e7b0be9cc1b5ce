"""Methods: one file each, one line each in `METHODS`. Imports torch alone.

A method is rows on seams, a card that says what it claims, and a test that holds it to that. Its
name stands for all its options, in ``--router NAME`` and as a row of a comparison.
"""

from __future__ import annotations

from importlib import import_module

from etr.methods.card import BRANCHES, Card, Row
from etr.methods.own import import_file, told_to_import
from etr.moe.routers import ROUTERS
from etr.table import check_name

SHELF = (
    "etr",
    "etr_paper",
    "baseline",
    "token_choice",
    "loss_free_balance",
    "expert_choice",
    "hash",
    "locmoe",
    "default_moe",
    "moe_pp",
    "tc_moe",
    "sigma_moe",
    "x_moe",
    "remoe",
    "dtop_p",
    "expert_threshold",
    "dynamoe",
    "expert_condenser",
    "dynamic_top_p",
    "global_balance",
    "bip",
    "super_experts",
    "easy_ep",
    "heapr",
    "mc_smoe",
    "made_it",
    "dynamic_dino",
    "read_me",
    "expert_upcycling",
    "flexmore",
    "compressed_experts",
    "quantmoe",
    "eaquant",
    "d2moe",
    "edgemoe",
    "adamoe",
    "router_coupling",
    "deepseek_moe",
    "union_of_experts",
    "chain_of_experts",
    "unipool",
    "rexmoe",
    "omnimoe",
    "routing_consistency",
    "exflow",
    "moetuner",
    "least_loaded",
    "expertflow",
    "dynamic_sharing",
    "dmoe",
    "scmoe",
    "rewire",
    "ec_dlm",
    "tide",
    "bacd",
    "composition",
    "fusion_route",
)
"""Files of this folder, each a method of its name, in the order in which pages list them."""

METHODS: dict[str, Card] = {name: import_module(f"{__name__}.{name}").CARD for name in SHELF}
"""Cards by name."""


def _add_rows(card: Card) -> None:
    """Put a card's rows into their tables; those that are there already stay."""
    new = [row for row in card.rows if row.table.get(row.kind.name) is not row.kind]
    for row in new:
        row.table.refuse_taken(row.kind)
    for row in new:
        row.table.add(row.kind)


for _card in METHODS.values():
    _add_rows(_card)


def add(card: Card) -> None:
    """Put a method of one's own on the shelf, and its rows into their tables.

    Where anything is refused, nothing has changed.

    Raises:
        ValueError: the name of the card or of a row is taken.
    """
    if card.name in METHODS:
        raise ValueError(f"method {card.name!r} is taken; choose another name")
    if card.name in ROUTERS and all(row.kind is not ROUTERS[card.name] for row in card.rows):
        raise ValueError(
            f"method {card.name!r} is taken by a router that is not its own; choose another name"
        )
    _add_rows(card)
    METHODS[card.name] = card


def options_of(text: str) -> dict[str, str]:
    """What a router's text stands for: a method's options as a whole, or else the router alone.

    Args:
        text: ``NAME`` or ``NAME:option=value,...``; options are those of the method's router.
    Returns:
        Values by field, as the command line writes them.
    Raises:
        ValueError: neither a method nor a router has the name, or the method sets no option, or no
            router that could have options.
    """
    name, _, more = text.partition(":")
    card = METHODS.get(name)
    if card is not None and not card.options:
        raise ValueError(
            f"router={name!r}: the method is not a choice about a layer; it runs by "
            f"`{card.command}`"
        )
    variants = (known for known, method in METHODS.items() if method.options)
    check_name("router", name, tuple(dict.fromkeys((*ROUTERS, *variants))))
    if card is None:
        return {"router": text}
    options = dict(card.options)
    if more:
        router = options.get("router")
        if router is None:
            raise ValueError(f"{text!r}: method {name!r} sets no router, so it takes no options")
        options["router"] = f"{router}{',' if ':' in router else ':'}{more}"
    return options


def check_router(text: str) -> None:
    """Refuse what is not a router's text, as a config holds it.

    Raises:
        ValueError: no router has the name, or an option is refused.
    """
    name = text.partition(":")[0]
    options = options_of(text)
    if name not in ROUTERS:
        raise ValueError(
            f"router={name!r} is a method, which sets {', '.join(options)}: "
            f"RoutingOptions(**etr.methods.options_of({name!r}))"
        )
    ROUTERS.parse(text)


__all__ = [
    "BRANCHES",
    "METHODS",
    "Card",
    "Row",
    "add",
    "check_router",
    "import_file",
    "options_of",
    "told_to_import",
]
