"""The figures of `etr theory`: rates and capacities by the theorems, which need no run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from etr.report.figure import add_legend, direct_label, new_figure
from etr.report.style import CARD, variant_style
from etr.theory.geometric import CHOICES, Choice, geometric_success
from etr.theory.tables import CheckRow, capacity_of, capacity_rows

TICKS = (0.05, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0)
STYLES = {choice: variant_style(number + 1) for number, choice in enumerate(CHOICES)}
ENTRIES = [(f"{c} choice" if c != "both" else "both", style) for c, style in STYLES.items()]


def draw_success(num_tokens: int, num_experts: int, signal: float, noisy: bool) -> Figure:
    """Success by capacity factor."""
    factor = np.geomspace(0.05, 8, 200)
    c = capacity_of(factor, num_tokens, num_experts)
    figure = new_figure()
    (axes,) = figure.axes
    for choice in CHOICES:
        rate = geometric_success(choice, c, num_tokens, num_experts, signal, noisy)
        _line(axes, factor, rate, choice)
    axes.set(xscale="log", xlabel="capacity factor", ylabel="success rate", ylim=(0, 1.02))
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    add_legend(figure, ENTRIES, markers=False)
    return figure


def draw_capacity(num_tokens: int, num_experts: int, signal: float, noisy: bool) -> Figure:
    """Capacity factor by wanted success rate."""
    wanted = np.linspace(0.01, 0.99, 99)
    rows = capacity_rows(wanted.tolist(), num_tokens, num_experts, signal, noisy)
    figure = new_figure()
    (axes,) = figure.axes
    for choice in CHOICES:
        tokens = np.array([row[choice] for row in rows], dtype=np.float64)  # None becomes NaN
        _line(axes, wanted, tokens * num_experts / num_tokens, choice)
    axes.set(xlabel="wanted success rate", ylabel="capacity factor")
    add_legend(figure, ENTRIES, markers=False)
    return figure


def draw_crossover(num_tokens: int, num_experts: int, factor: float) -> Figure:
    """Success by signal at one capacity factor, for a fixed and for a noisy score."""
    c = int(capacity_of(factor, num_tokens, num_experts))
    signal = np.linspace(0, 5, 201)
    figure = new_figure(1, 2)
    for axes, noisy in zip(figure.axes, (False, True), strict=True):
        for choice in CHOICES:
            rate = geometric_success(choice, c, num_tokens, num_experts, signal, noisy)
            _line(axes, signal, rate, choice)
        direct_label(axes, f"{'noisy' if noisy else 'fixed'} score, factor {factor:g}")
        axes.set(xlabel="signal", ylim=(0, 1.02))
    figure.axes[0].set_ylabel("success rate")
    add_legend(figure, ENTRIES, markers=False)
    return figure


def draw_check(rows: Sequence[CheckRow]) -> Figure:
    """Sampled success rates by exact ones, with intervals."""
    figure = new_figure()
    (axes,) = figure.axes
    axes.plot([0, 1], [0, 1], color=CARD.dark, linewidth=0.7)
    for _, _, choice, exact, sampled, low, high in rows:
        style = STYLES[choice]
        axes.errorbar(
            exact,
            sampled,
            yerr=np.maximum([[sampled - low], [high - sampled]], 0),
            color=style.color,
            marker=style.marker,
            markersize=4.5,
        )
    axes.set(xlabel="exact success rate", ylabel="sampled, with interval")
    add_legend(figure, ENTRIES, lines=False)
    return figure


def _line(axes: Any, x: Any, y: Any, choice: Choice) -> None:
    style = STYLES[choice]
    axes.plot(x, y, color=style.color, linestyle=style.linestyle)
