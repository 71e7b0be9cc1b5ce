"""`etr theory`: success rates, capacities and the crossover, by the theorems and by samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from etr.cli._options import parse
from etr.cli._tables import make_table
from etr.files import write_bytes
from etr.report.figure import add_legend, direct_label, house_style, new_figure
from etr.report.style import CARD, LineStyle, variant_style
from etr.theory import Bounds, geometric_success
from etr.theory.geometric import CHOICES, Choice
from etr.theory.lower_bound import FORMS, capacity_lower_bound
from etr.theory.tables import (
    CheckRow,
    capacity_of,
    capacity_rows,
    check_rows,
    crossover_rows,
    findings,
    success_rows,
)

FACTORS = (0.1, 0.3, 0.6, 1.0, 1.1, 1.5, 2.0, 4.0)
TICKS = (0.05, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0)
STYLES: dict[Choice, LineStyle] = {
    choice: variant_style(number + 1) for number, choice in enumerate(CHOICES)
}
ENTRIES = [
    (f"{choice} choice" if choice != "both" else "both", STYLES[choice]) for choice in CHOICES
]


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


@dataclass(frozen=True, kw_only=True)
class SuccessConfig(SizeConfig):
    """Exact success rates by capacity, with the paper's bounds and tighter ones."""

    signal: float = 1.5
    """Score of the telling token at its expert, standard deviations of the others' scores."""
    noisy: bool = False
    """That score varies like the others, around the signal."""
    capacity_factors: tuple[float, ...] = FACTORS
    """Capacities, in mean loads."""

    def run(self, console: Console) -> int:
        rows = success_rows(
            self.capacity_factors, self.num_tokens, self.num_experts, self.signal, self.noisy
        )
        table = _table(
            f"Success, {_sizes(self)}, signal {self.signal:g}",
            ("factor", "C", "choice", "exact", "paper", "tighter"),
        )
        for row in rows:
            exact = f"{row.exact:.4f}"
            bounds = (_interval(row.paper), _interval(row.tight))
            table.add_row(f"{row.factor:g}", str(row.capacity), row.choice, exact, *bounds)
        console.print(table)
        print("-: no statement for this case; vacuous: excludes nothing; *: one side only")
        return 0

    def draw(self) -> Figure:
        """Success by capacity factor."""
        factor = np.geomspace(0.05, 8, 200)
        c = capacity_of(factor, self.num_tokens, self.num_experts)
        figure = new_figure()
        axes = figure.axes[0]
        for choice in CHOICES:
            rate = geometric_success(
                choice, c, self.num_tokens, self.num_experts, self.signal, self.noisy
            )
            _line(axes, factor, rate, choice)
        axes.set(xscale="log", xlabel="capacity factor", ylabel="success rate", ylim=(0, 1.02))
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        return figure


@dataclass(frozen=True, kw_only=True)
class CapacityConfig(SizeConfig):
    """The capacity that a success rate needs, and the lower bound from angles."""

    signal: float = 1.5
    """Score of the telling token at its expert, standard deviations of the others' scores."""
    noisy: bool = False
    """That score varies like the others, around the signal."""
    wanted: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    """Success rates."""
    hidden_size: int = 128
    """Dimensions, for the lower bound."""
    affinities: tuple[float, ...] = (0.0, 0.1, 0.135, 0.2, 0.3, 0.4, 0.5)
    """Cosines, for the lower bound."""

    def run(self, console: Console) -> int:
        table = _table(
            f"Capacity in tokens (and factor), {_sizes(self)}, signal {self.signal:g}",
            ("wanted", *(choice for choice in CHOICES)),
        )
        for rate, needed in zip(self.wanted, self._needed(self.wanted), strict=True):
            cells = [
                "-" if c is None else f"{c} ({c * self.num_experts / self.num_tokens:.2f})"
                for c in needed.values()
            ]
            table.add_row(f"{rate:g}", *cells)
        console.print(table)
        print("-: out of reach; tokens that choose another expert are lost at any capacity")
        table = _table(
            f"Lower bound in tokens, H {self.hidden_size}, {self.num_experts} experts "
            f"(mean load {self.num_tokens / self.num_experts:g})",
            ("affinity", "exact", "erfc", "exponential"),
        )
        for d in self.affinities:
            bounds = (capacity_lower_bound(self.hidden_size, self.num_experts, d, f) for f in FORMS)
            table.add_row(f"{d:g}", *(f"{float(bound):.4g}" for bound in bounds))
        console.print(table)
        return 0

    def draw(self) -> Figure:
        """Capacity by wanted rate."""
        wanted = np.linspace(0.01, 0.99, 99)
        rows = self._needed(wanted.tolist())
        figure = new_figure()
        axes = figure.axes[0]
        for choice in CHOICES:
            tokens = [row[choice] for row in rows]
            factor = np.array([np.nan if c is None else c for c in tokens], dtype=np.float64)
            _line(axes, wanted, factor * self.num_experts / self.num_tokens, choice)
        axes.set(xlabel="wanted success rate", ylabel="capacity factor")
        return figure

    def _needed(self, wanted: Sequence[float]) -> list[dict[Choice, int | None]]:
        return capacity_rows(wanted, self.num_tokens, self.num_experts, self.signal, self.noisy)


@dataclass(frozen=True, kw_only=True)
class CrossoverConfig(SizeConfig):
    """The signal from which expert choice is ahead of token choice."""

    capacity_factors: tuple[float, ...] = FACTORS
    """Capacities, in mean loads."""

    def run(self, console: Console) -> int:
        table = _table(
            f"Crossover, {_sizes(self)}",
            ("factor", "C", "fixed score", "success there", "noisy score"),
        )
        for row in crossover_rows(self.capacity_factors, self.num_tokens, self.num_experts):
            cells = ("none" if np.isnan(x) else f"{x:.3f}" for x in row[2:])
            table.add_row(f"{row.factor:g}", str(row.capacity), *cells)
        console.print(table)
        print("signals in standard deviations; 0: expert choice is never behind")
        return 0

    def draw(self) -> Figure:
        """Success by signal, for a fixed and for a noisy score, at the middle capacity."""
        factor = self.capacity_factors[(len(self.capacity_factors) - 1) // 2]
        c = int(capacity_of(factor, self.num_tokens, self.num_experts))
        signal = np.linspace(0, 5, 201)
        figure = new_figure(1, 2)
        for axes, noisy in zip(figure.axes, (False, True), strict=True):
            for choice in CHOICES:
                rate = geometric_success(
                    choice, c, self.num_tokens, self.num_experts, signal, noisy
                )
                _line(axes, signal, rate, choice)
            direct_label(axes, f"{'noisy' if noisy else 'fixed'} score, factor {factor:g}")
            axes.set(xlabel="signal", ylim=(0, 1.02))
        figure.axes[0].set_ylabel("success rate")
        return figure


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
    """That all intervals hold at once."""

    def run(self, console: Console) -> int:
        rows = self.rows
        table = _table(
            f"Samples against exact forms ({self.samples:,} per signal)",
            ("score", "signal", "choice", "exact", "sampled", "interval", "agrees"),
        )
        for row in rows:
            table.add_row(
                "noisy" if row.noisy else "fixed",
                f"{row.signal:g}",
                row.choice,
                f"{row.exact:.4f}",
                f"{row.sampled:.4f}",
                f"{row.low:.4f} to {row.high:.4f}",
                "yes" if row.agrees else "NO",
            )
        console.print(table)
        middle = self.signals[(len(self.signals) - 1) // 2]
        table = _table(f"What the statements say here, signal {middle:g}", ("statement", "here"))
        for statement, here in findings(self.num_tokens, self.num_experts, middle):
            table.add_row(statement, here)
        console.print(table)
        wrong = sum(not row.agrees for row in rows)
        print(f"{len(rows) - wrong} of {len(rows)} agree")
        return 1 if wrong else 0

    def draw(self) -> Figure:
        """Sampled against exact rates, with intervals."""
        figure = new_figure()
        axes = figure.axes[0]
        axes.plot([0, 1], [0, 1], color=CARD.dark, linewidth=0.7)
        for row in self.rows:
            ends = [[row.sampled - row.low], [row.high - row.sampled]]
            style = STYLES[row.choice]
            axes.errorbar(
                row.exact,
                row.sampled,
                yerr=np.maximum(ends, 0),
                color=style.color,
                marker=style.marker,
                markersize=4.5,
            )
        axes.set(xlabel="exact success rate", ylabel="sampled, with interval")
        return figure

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


Command = (
    Annotated[SuccessConfig, tyro.conf.subcommand("success")]
    | Annotated[CapacityConfig, tyro.conf.subcommand("capacity")]
    | Annotated[CrossoverConfig, tyro.conf.subcommand("crossover")]
    | Annotated[CheckConfig, tyro.conf.subcommand("check")]
)


def run(arguments: list[str]) -> int:
    """Print the tables, draw the figure if one is asked for."""
    config = parse(cast(Any, Command), "theory", arguments)
    code = int(config.run(Console()))
    if config.figure is not None:
        with house_style():
            figure = config.draw()
            sampled = isinstance(config, CheckConfig)
            add_legend(figure, ENTRIES, lines=not sampled, markers=sampled)
            content = BytesIO()
            metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
            figure.savefig(content, format="svg", facecolor=CARD.light, metadata=metadata)
        write_bytes(config.figure, content.getvalue())
        print(f"figure: {config.figure}")
    return code


def _sizes(config: SizeConfig) -> str:
    return f"{config.num_tokens} tokens, {config.num_experts} experts"


def _table(title: str, columns: Sequence[str]) -> Table:
    words = ("choice", "score", "statement", "here", "agrees")
    return make_table(*columns, words=words, title=title)


def _interval(bounds: Bounds | None) -> str:
    if bounds is None:
        return "-"
    if bounds.vacuous:
        return "vacuous"
    return f"{bounds.lower:.4f} to {bounds.upper:.4f}{'' if bounds.valid else ' *'}"


def _line(axes: Any, x: Any, y: Any, choice: Choice) -> None:
    style = STYLES[choice]
    axes.plot(x, y, color=style.color, linestyle=style.linestyle)
