"""What a method says of itself: its rows, its options, and a claim that a test holds it to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from etr.moe.capacity import CAPACITIES
from etr.moe.losses import LossConfig
from etr.moe.routers import ROUTERS, RouterTraits
from etr.table import Table, value_of

BRANCHES: dict[str, tuple[str, ...]] = {
    "model": (
        "expert design",
        "attention",
        "pruning",
        "quantization",
        "distillation",
        "decomposition",
        "dynamic routing",
        "merging",
        "training",
        "decoding",
    ),
    "system": ("parallelism", "load balancing", "scheduling", "offloading and caching"),
    "hardware": ("co-design",),
}
"""Branches of each level, after the survey arXiv 2412.14219. Training and decoding are this
library's, for methods that a survey of inference does not cover."""
COMMANDS = {
    "transform": "etr transform {name} SRC DST",
    "planner": "etr plan {name} TRACE",
    "cache": "etr cache TRACE --caches {name}",
    "measure": "etr trace MODEL --measures {name}",
    "serving": "etr generate MODEL --selection {name}",
    "decoding": "etr generate MODEL --decoding {name}",
    "unmasking": "etr generate MODEL --unmasking {name}",
    "composition": "etr compose {name} MODEL...",
}
"""Verbs by the table whose rows they name, for methods that set no option of a layer."""
MOVES = ("loss", "load", "drops", "experts per token", "FLOPs", "bytes", "memory")
"""What a method may change in a comparison."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A class that a method puts into a table, or that it finds there."""

    table: Table[Any]
    """ROUTERS, CAPACITIES, ..."""
    kind: type[Any]
    """A frozen config with a `name`."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A method: which rows it is made of, how to ask for it, and what it claims."""

    name: str
    """Its name everywhere, and that of its file: lower case letters, digits and _."""
    title: str
    """Its name in prose."""
    summary: str
    """What it does, in a line."""
    level: str
    """model, system or hardware."""
    branch: str
    """One of the level's in `BRANCHES`."""
    claim: str
    """A sentence with its number or symbol, which the criterion in the method's test checks."""
    paper: str = ""
    """arXiv ids, separated by commas; empty where nothing is published."""
    rows: tuple[Row, ...] = ()
    """May be empty: a method that only sets options."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What ``--router NAME`` sets, by field, as the command line writes values. Empty for a method
    that is no choice about a layer: a transform, a planner."""
    against: str = "token_choice"
    """The variant it is compared with, where it is a variant itself: a card with options. Without
    them a row of its first row's table; any other name means nothing there."""
    moves: tuple[str, ...] = ()
    """What it may change, of `MOVES`."""
    departs: str = ""
    """Where it differs from the paper, and why."""
    ranks: Literal["all", "own"] = "all"
    """Whose tokens it looks at: those of all ranks, or each rank's own."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"card name={self.name!r} must be lower case letters, digits and _")
        self._one_of("level", self.level, BRANCHES)
        self._one_of("branch", self.branch, BRANCHES[self.level])
        self._one_of("ranks", self.ranks, ("all", "own"))
        for what in self.moves:
            self._one_of("moves", what, MOVES)
        if self.paper and not re.fullmatch(r"\d{4}\.\d{4,5}(, \d{4}\.\d{4,5})*", self.paper):
            raise ValueError(
                f"card {self.name!r}: paper={self.paper!r} must be arXiv ids such as 2406.00023, "
                "separated by commas"
            )
        if not self.claim.endswith("."):
            raise ValueError(f"card {self.name!r}: claim={self.claim!r} must be a sentence")
        if not (self.rows or self.options):
            raise ValueError(f"card {self.name!r} has neither rows nor options; it changes nothing")

    def _one_of(self, name: str, value: str, known: Any) -> None:
        if value not in known:
            raise ValueError(
                f"card {self.name!r}: {name}={value!r} must be one of {', '.join(known)}"
            )

    @property
    def traits(self) -> RouterTraits | None:
        """Facts about the router that the options build; None where they name none."""
        text = self.options.get("router")
        return None if text is None else ROUTERS.parse(text).traits

    @property
    def causal(self) -> bool | None:
        """Whether no later token changes an earlier one's experts; None where nothing chooses."""
        facts = [getattr(row.kind, "causal", None) for row in self.rows]
        if self.traits is not None:
            facts.append(self.traits.causal)
        found = [fact for fact in facts if isinstance(fact, bool)]
        return all(found) if found else None

    @property
    def fixed_load(self) -> bool | None:
        """Whether every expert gets the same number of tokens; None where no router is named."""
        return None if self.traits is None else self.traits.fixed_load

    @property
    def seam(self) -> str:
        """What it mainly is: the table of its first row, or the first option that it sets."""
        return self.rows[0].table.field if self.rows else next(iter(self.options))

    @property
    def command(self) -> str:
        """How it is asked for: its options, or the verb that reads the table of its first row."""
        if not self.options:
            return COMMANDS.get(self.seam, "etr methods {name}").format(name=self.rows[0].kind.name)
        pairs = (f"--{name.replace('_', '-')} {value}" for name, value in self.options.items())
        return " ".join(pairs)

    @property
    def rival(self) -> str:
        """What it is compared with; empty where there is nothing of its kind."""
        known = self.options or self.against.partition(":")[0] in self.rows[0].table
        return self.against if known else ""

    def config_options(self) -> dict[str, Any]:
        """The options as `MoEConfig` takes them."""
        values: dict[str, Any] = {name: value_of(text) for name, text in self.options.items()}
        for name, table in (("router", ROUTERS), ("capacity", CAPACITIES)):
            if name in values:
                values[name] = table.parse(self.options[name])
        weights = {f.name: values.pop(f.name) for f in fields(LossConfig) if f.name in values}
        return {**values, **({"losses": LossConfig(**weights)} if weights else {})}
