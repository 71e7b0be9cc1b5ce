"""`etr theory`: success rates, capacities and the crossover, by the theorems and by samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import tyro
from rich.console import Console

from etr.cli._options import parse
from etr.cli._tables import make_table
from etr.report.chart import save_svg
from etr.report.figures.theory import draw_capacity, draw_check, draw_crossover, draw_success
from etr.report.spec import Chart
from etr.theory import Bounds
from etr.theory.geometric import CHOICES
from etr.theory.lower_bound import FORMS, capacity_lower_bound
from etr.theory.tables import (
    CheckRow,
    agrees,
    capacity_rows,
    check_rows,
    crossover_rows,
    findings,
    success_rows,
)

FACTORS = (0.1, 0.3, 0.6, 1.0, 1.1, 1.5, 2.0, 4.0)
WORDS = ("choice", "score", "statement", "here", "agrees")
"""Columns of text."""
Printed = tuple[str, Sequence[str], Iterable[Sequence[str]], str]
"""A table's title, heading and cells, and the line below it."""


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """Sizes of the model, and where to draw."""

    num_tokens: int = 128
    """Tokens per sample."""
    num_experts: int = 8
    """Experts."""
    figure: Path | None = None
    """Also draw, as this SVG file."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "num_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.figure is not None and self.figure.suffix != ".svg":
            raise ValueError(f"figure={str(self.figure)!r} must end in .svg")

    @property
    def sizes(self) -> str:
        """The sizes in words."""
        return f"{self.num_tokens} tokens, {self.num_experts} experts"

    def tables(self) -> Iterator[Printed]:
        """What is printed."""
        raise NotImplementedError

    def draw(self) -> Chart:
        """The figure that goes with the tables."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SuccessConfig(SizeConfig):
    """Exact success rates by capacity, with the paper's bounds and tighter ones."""

    signal: float = 1.5
    """Score of the telling token at its expert, standard deviations of the others' scores."""
    noisy: bool = False
    """Let that score vary like the others, around the signal."""
    capacity_factors: tuple[float, ...] = FACTORS
    """Capacities, in mean loads."""

    def tables(self) -> Iterator[Printed]:
        rows = success_rows(
            self.capacity_factors, self.num_tokens, self.num_experts, self.signal, self.noisy
        )
        yield (
            f"Success, {self.sizes}, signal {self.signal:g}",
            ("factor", "C", "choice", "exact", "paper", "tighter"),
            (
                (
                    *(f"{factor:g}", str(c), choice, f"{exact:.4f}"),
                    *(_interval(paper), _interval(tighter)),
                )
                for factor, c, choice, exact, paper, tighter in rows
            ),
            "-: no statement for this case; vacuous: excludes nothing; *: one side only",
        )

    def draw(self) -> Chart:
        return draw_success(self.num_tokens, self.num_experts, self.signal, self.noisy)


@dataclass(frozen=True, kw_only=True)
class RequiredCapacityConfig(SizeConfig):
    """The capacity that a success rate needs, and the lower bound from angles."""

    signal: float = 1.5
    """Score of the telling token at its expert, standard deviations of the others' scores."""
    noisy: bool = False
    """Let that score vary like the others, around the signal."""
    wanted: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    """Success rates."""
    hidden_size: int = 128
    """Dimensions, for the lower bound."""
    affinities: tuple[float, ...] = (0.0, 0.1, 0.135, 0.2, 0.3, 0.4, 0.5)
    """Cosines, for the lower bound."""

    def tables(self) -> Iterator[Printed]:
        sizes = (self.num_tokens, self.num_experts)
        rows = capacity_rows(self.wanted, *sizes, self.signal, self.noisy)
        mean_load = self.num_tokens / self.num_experts
        yield (
            f"Capacity in tokens (and factor), {self.sizes}, signal {self.signal:g}",
            ("wanted", *CHOICES),
            (
                (
                    f"{rate:g}",
                    *("-" if c is None else f"{c} ({c / mean_load:.2f})" for c in needed.values()),
                )
                for rate, needed in zip(self.wanted, rows, strict=True)
            ),
            "-: out of reach; tokens that choose another expert are lost at any capacity",
        )

        def bound(affinity: float, form: Any) -> float:
            return float(capacity_lower_bound(self.hidden_size, self.num_experts, affinity, form))

        yield (
            f"Lower bound in tokens, H {self.hidden_size}, {self.num_experts} experts "
            f"(mean load {mean_load:g})",
            ("affinity", *FORMS),
            ((f"{d:g}", *(f"{bound(d, form):.4g}" for form in FORMS)) for d in self.affinities),
            "",
        )

    def draw(self) -> Chart:
        return draw_capacity(self.num_tokens, self.num_experts, self.signal, self.noisy)


@dataclass(frozen=True, kw_only=True)
class CrossoverConfig(SizeConfig):
    """The signal from which expert choice is ahead of token choice."""

    capacity_factors: tuple[float, ...] = FACTORS
    """Capacities, in mean loads."""

    def tables(self) -> Iterator[Printed]:
        rows = crossover_rows(self.capacity_factors, self.num_tokens, self.num_experts)
        yield (
            f"Crossover, {self.sizes}",
            ("factor", "C", "fixed score", "success there", "noisy score"),
            (
                (f"{factor:g}", str(c), *("none" if np.isnan(x) else f"{x:.3f}" for x in signals))
                for factor, c, *signals in rows
            ),
            "signals in standard deviations; 0: expert choice is never behind",
        )

    def draw(self) -> Chart:
        middle = self.capacity_factors[(len(self.capacity_factors) - 1) // 2]
        return draw_crossover(self.num_tokens, self.num_experts, middle)


@dataclass(frozen=True, kw_only=True)
class CheckConfig(SizeConfig):
    """Samples of the geometric model against the exact forms; exit code 1 on disagreement."""

    signals: tuple[float, ...] = (0.5, 1.5, 3.0)
    """Scores of the telling token at its expert, standard deviations."""
    capacity_factor: float = 0.6
    """Capacity, in mean loads."""
    samples: int = 20_000
    """Samples per signal."""
    seed: int = 0
    """Seed of the samples."""
    confidence: float = 0.999
    """Confidence that all intervals hold at once."""

    @cached_property
    def rows(self) -> list[CheckRow]:
        """The samples, drawn once for table and figure."""
        return check_rows(
            self.capacity_factor,
            self.num_tokens,
            self.num_experts,
            self.signals,
            self.samples,
            self.seed,
            self.confidence,
        )

    def tables(self) -> Iterator[Printed]:
        yield (
            f"Samples against exact forms ({self.samples:,} per signal)",
            ("score", "signal", "choice", "exact", "sampled", "interval", "agrees"),
            (
                (
                    "noisy" if noisy else "fixed",
                    *(f"{signal:g}", choice, f"{exact:.4f}", f"{sampled:.4f}"),
                    f"{low:.4f} to {high:.4f}",
                    "yes" if low <= exact <= high else "NO",
                )
                for noisy, signal, choice, exact, sampled, low, high in self.rows
            ),
            "",
        )
        middle = self.signals[(len(self.signals) - 1) // 2]
        yield (
            f"What the statements say here, signal {middle:g}",
            ("statement", "here"),
            findings(self.num_tokens, self.num_experts, middle),
            f"{sum(map(agrees, self.rows))} of {len(self.rows)} agree",
        )

    def draw(self) -> Chart:
        return draw_check(self.rows)


Command = (
    Annotated[SuccessConfig, tyro.conf.subcommand("success")]
    | Annotated[RequiredCapacityConfig, tyro.conf.subcommand("capacity")]
    | Annotated[CrossoverConfig, tyro.conf.subcommand("crossover")]
    | Annotated[CheckConfig, tyro.conf.subcommand("check")]
)


def run(arguments: list[str]) -> int:
    """Print the tables, draw the figure if one is asked for."""
    config = parse(cast(Any, Command), "theory", arguments)
    console = Console()
    for title, head, rows, note in config.tables():
        table = make_table(*head, words=WORDS, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        if note:
            print(note)
    if config.figure is not None:
        save_svg(config.draw(), config.figure)
        print(f"figure: {config.figure}")
    return int(isinstance(config, CheckConfig) and not all(map(agrees, config.rows)))


def _interval(bounds: Bounds | None) -> str:
    if bounds is None:
        return "-"
    if bounds.vacuous:
        return "vacuous"
    return f"{bounds.lower:.4f} to {bounds.upper:.4f}{'' if bounds.valid else ' *'}"
