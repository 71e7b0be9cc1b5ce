"""Rivals: every router on the shelf on the same work, each against its own reference."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from etr.methods import METHODS, Card
from etr.study.grid import Block
from etr.study.study import Study
from etr.study.tasks import TASKS
from etr.train import RoutingOptions

STEPS = {"text-x": 600, "lm": 150}
"""Optimizer steps at equal steps, by task. A step of all rows, one after another, took one core
3.4 s on `text-x` and 25 s on `lm`."""
SEEDS, MORE_SEEDS = (0, 1, 2), (3, 4)
HEADLINE = ("etr", "deepseek_moe", "loss_free_balance")
"""Methods that, with their references, have the further seeds too."""
SMOKE_STEPS = {"text-x": 10}
SMOKE_METHODS = ("token_choice", "dynamic_top_p", "bip")

AS_MANY = ("moe_pp", "tc_moe", "remoe", "dtop_p")
"""Methods whose cards leave open how many experts a token takes: two, as in their references."""
WARM_UP = 4
"""Of how many steps one is the warm-up of `expert_threshold`; published is 4000 of far more."""

CLAIMED = {
    "union_of_experts": "perplexity lower by 2.38",
    "chain_of_experts": "loss 1.20 to 1.12, 64 experts, mathematical text",
}
"""What authors report, as far as it was read; other papers' numbers are of other measures."""


def reference(card: Card, task: str) -> tuple[str, str]:
    """Name and variant of what a method is compared with on a task.

    Widths of experts are written for experts of the default width, and scaled to the task's; they
    are not in the name, which is the same on every task.
    """
    usual, own = RoutingOptions().expert_size, TASKS[task].config(1).model.routing.expert_size

    def scaled(found: re.Match[str]) -> str:
        return f"expert_size={int(found[1]) * own // usual}"

    name = re.sub(r"[^a-z0-9_.]+", "-", re.sub(r"/expert_size=\d+", "", card.against).lower())
    text = re.sub(r"expert_size=(\d+)", scaled, card.against)
    return name, text if name == card.against else f"{name}={text}"


def row(card: Card, steps: int) -> str:
    """A method's variant, under its own name, in a run of so many optimizer steps."""
    if card.name in AS_MANY:
        return f"{card.name}={card.name}/top_k=2"
    if card.name == "expert_threshold":
        return f"{card.name}={card.name}:warmup={steps // WARM_UP}"
    return card.name


def rivals(
    steps: Mapping[str, int] = STEPS,
    seeds: Sequence[int] = SEEDS,
    more_seeds: Sequence[int] = MORE_SEEDS,
    methods: Sequence[str] = (),
) -> Study:
    """The study: at equal steps and at equal expert FLOPs on each task.

    Args:
        steps: optimizer steps, by task.
        seeds: of every row.
        more_seeds: of the headline's rows, beside these.
        methods: on the shelf; all that set a router where none is named.
    """
    cards = [METHODS[name] for name in methods or METHODS if "router" in METHODS[name].options]
    names = {card.name: reference(card, "text-x")[0] for card in cards}
    blocks: list[Block] = []
    for task, count in steps.items():
        known = dict(reference(card, task) for card in cards)
        own = {card.name: row(card, count) for card in cards if card.name not in known}
        same: dict[str, Any] = {"task": task, "steps": count, "diagnostics": True}
        blocks.append(
            Block(name=task, variants=(*known.values(), *own.values()), seeds=tuple(seeds), **same)
        )
        headline = [card for card in cards if card.name in HEADLINE] if more_seeds else []
        every = own | known
        pairs = {n: every[n] for card in headline for n in (names[card.name], card.name)}
        both = tuple(seeds) + tuple(more_seeds)
        matched = tuple(every[card.name] for card in cards if names[card.name] != card.name)
        for label, variants, chosen in (
            ("headline", tuple(pairs.values()), both),
            ("matched", matched, tuple(seeds)),
            ("headline, matched", tuple(every[card.name] for card in headline), both),
        ):
            match = "expert_flops" if "matched" in label else "steps"
            if variants:
                more = {**same, "match": match, "seeds": chosen}
                blocks.append(Block(name=f"{task}, {label}", variants=variants, **more))
    return Study(blocks=tuple(blocks), reference=names[cards[0].name], references=names)


def smoke() -> Study:
    """The whole path on two methods and a few steps: for tests, not for conclusions."""
    return rivals(SMOKE_STEPS, (0, 1), (), SMOKE_METHODS)
