"""The figures of `etr theory`: rates and capacities by the theorems, which need no run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from etr.report.marks import layer, mark, named, numeric, panels, rounded
from etr.report.spec import Chart
from etr.report.style import AXIS, SERIES
from etr.theory.geometric import CHOICES, Choice, geometric_success
from etr.theory.tables import CheckRow, capacity_of, capacity_rows

TICKS = (0.05, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0)
NAMES = {choice: f"{choice} choice" if choice != "both" else "both" for choice in CHOICES}
_RATE = {"domain": [0, 1.02], "nice": False}
Line = tuple[Choice, Any, Any]


def draw_success(num_tokens: int, num_experts: int, signal: float, noisy: bool) -> Chart:
    """Success by capacity factor."""
    factor = np.geomspace(0.05, 8, 200)
    c = capacity_of(factor, num_tokens, num_experts)
    lines = _rates(c, num_tokens, num_experts, signal, noisy, factor)
    scale = {"type": "log", "domain": [0.05, 8], "nice": False}
    x = numeric("x", "capacity factor", scale=scale, values=list(TICKS), format="~g")
    return _lines(lines, x, numeric("y", "success rate", scale=_RATE))


def draw_capacity(num_tokens: int, num_experts: int, signal: float, noisy: bool) -> Chart:
    """Capacity factor by wanted success rate."""
    wanted = np.linspace(0.01, 0.99, 99)
    rows = capacity_rows(wanted.tolist(), num_tokens, num_experts, signal, noisy)
    lines: list[Line] = []
    for choice in CHOICES:
        tokens = np.array([row[choice] for row in rows], dtype=np.float64)  # None becomes NaN
        lines.append((choice, wanted, tokens * num_experts / num_tokens))
    return _lines(lines, numeric("x", "wanted success rate"), numeric("y", "capacity factor"))


def draw_crossover(num_tokens: int, num_experts: int, factor: float) -> Chart:
    """Success by signal at one capacity factor, for a fixed and for a noisy score."""
    c = int(capacity_of(factor, num_tokens, num_experts))
    signal = np.linspace(0, 5, 201)
    records = []
    for noisy in (False, True):
        panel = f"{'noisy' if noisy else 'fixed'} score, factor {factor:g}"
        records += [
            {**record, "panel": panel}
            for record in _records(_rates(c, num_tokens, num_experts, signal, noisy, signal))
        ]
    spec = layer(
        mark("line"),
        x=numeric("x", "signal"),
        y=numeric("y", "success rate", scale=_RATE),
        color=_color(),
    )
    return panels(records, spec, height=250)


def draw_check(rows: Sequence[CheckRow]) -> Chart:
    """Sampled success rates by exact ones, with intervals."""
    records = [
        {"choice": NAMES[choice], "x": exact, "y": sampled, "low": low, "high": high}
        for _, _, choice, exact, sampled, low, high in rows
    ]
    diagonal = {"values": [{"x": 0, "y": 0}, {"x": 1, "y": 1}]}
    title, color = "sampled, with interval", _color()
    x, y = numeric("x", "exact success rate"), numeric("y", title)
    line = mark("line", color=AXIS.css, strokeWidth=1)
    dot = mark("point", filled=True, size=40, opacity=1)
    return {
        "data": {"values": records},
        "height": 280,
        "layer": [
            {"data": diagonal, **layer(line, x=x, y=y)},
            layer(mark("rule"), x=x, y=numeric("low", title), y2={"field": "high"}, color=color),
            layer(dot, x=x, y=y, color=color),
        ],
    }


def _rates(
    c: Any, num_tokens: int, num_experts: int, signal: Any, noisy: bool, x: Any
) -> list[Line]:
    """A line of success for each choice, along `x`."""
    return [
        (choice, x, geometric_success(choice, c, num_tokens, num_experts, signal, noisy))
        for choice in CHOICES
    ]


def _lines(lines: Sequence[Line], x: Any, y: Any) -> Chart:
    return {
        "data": {"values": _records(lines)},
        "transform": [{"flatten": ["x", "y"]}],
        "height": 250,
        **layer(mark("line"), x=x, y=y, color=_color()),
    }


def _records(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [
        {"variant": "", "choice": NAMES[choice], "x": rounded(x), "y": rounded(y)}
        for choice, x, y in lines
    ]


def _color() -> dict[str, Any]:
    tints = (tint.css for tint in SERIES[1:])
    return named("choice", dict(zip(NAMES.values(), tints, strict=False)))
