"""The table of seams in docs/architecture.md: where a change goes, with what is there today.

python tools/seams.py
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- seams: made by tools/seams.py -->", "<!-- end of seams -->"

MOST = 10
"""Rows that are named; of a longer table the first ones."""


@dataclass(frozen=True)
class Seam:
    """One table of the library."""

    change: str
    """What a row of it adds."""
    table: str
    """Module and name of the table."""
    place: str
    """File or folder where a row's code goes, under src/etr."""
    row: str
    """What a row is."""


SEAMS = (
    Seam("a published method", "etr.methods:METHODS", "methods", "a `Card`, whose rows go below"),
    Seam("a router", "etr.moe:ROUTERS", "moe/routers", "a config that builds a `Router`"),
    Seam("a capacity", "etr.moe:CAPACITIES", "moe/capacity", "a config that builds a policy"),
    Seam("a loss", "etr.moe.losses:LOSSES", "moe/losses", "a `Loss`, called with a `LossInput`"),
    Seam("how a layer serves", "etr.moe.serving:SERVING", "moe/serving", "a `Serving`"),
    Seam("a way for rows to travel", "etr.moe:DISPATCHERS", "moe/dispatch", "a `Dispatcher`"),
    Seam(
        "which weights are meant", "etr.moe:BANKS", "moe/experts", "a config that builds a `Bank`"
    ),
    Seam("an expert backend", "etr.moe:EXPERT_BACKENDS", "moe/experts", "an `ExpertBackend`"),
    Seam("another checkpoint of one", "etr.model:TRANSFORMS", "model", "a `Transform`"),
    Seam("what is trained on", "etr.model:OBJECTIVES", "model", "an `Objective`"),
    Seam("a choice by several routings", "etr.model:DECODINGS", "model", "a `Decoding`"),
    Seam("which masks are filled", "etr.model:UNMASKINGS", "model", "an `Unmasking`"),
    Seam("several models as one", "etr.model:COMPOSITIONS", "model", "a `Composition`"),
    Seam("a placement of experts", "etr.systems:PLANNERS", "systems", "a `Planner`"),
    Seam("a number of a trace", "etr.systems:MEASURES", "systems", "a `Measure`"),
    Seam("a memory of a few experts", "etr.systems:CACHES", "systems", "a `Cache`"),
    Seam("a transformers family", "etr.hf.families:FAMILIES", "hf/families", "a `Family`"),
    Seam("a kind of file with text", "etr.data.reading:READERS", "data/reading.py", "a function"),
    Seam("an exam", "etr.evaluate.tasks:EXAMS", "evaluate/tasks", "a function that makes it"),
    Seam("a task of the study", "etr.study.tasks:TASKS", "train/tasks", "a `TaskEntry`"),
    Seam("a figure", "etr.report.figures:FIGURES", "report/figures", "a `Spec`"),
    Seam("a verb", "etr_command:VERBS", "cli", "a line of help; a file of its name"),
)


def names_of(table: Any) -> list[str]:
    """Names of the rows, in the table's order."""
    return list(table) if isinstance(table, Mapping) else [row.key for row in table]


def seams_table() -> str:
    """The table, in Markdown."""
    from etr.sheet import table

    rows = []
    for seam in SEAMS:
        module, _, name = seam.table.partition(":")
        rows_there = names_of(getattr(importlib.import_module(module), name))
        found = ", ".join(f"`{row}`" for row in rows_there[:MOST])
        if len(rows_there) > MOST:
            found += f", ... {len(rows_there)} in all"
        rows.append((seam.change, f"`{name}`", f"`{seam.place}`", seam.row, found))
    return table(("to add", "table", "its file goes to", "a row is", "there are"), rows)


def renewed(text: str) -> str:
    """The page with today's table.

    Raises:
        ValueError: the marks around the table are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} must hold {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{seams_table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"renewed: {PAGE.relative_to(ROOT)}")
