"""Held-out loss minus the baseline's over training, with the interval of its mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from etr.report.curves import evaluation_curve
from etr.report.found import MOST_RUNS, too_many
from etr.report.lines import STEPS, not_shown
from etr.report.marks import (
    PLAIN_ZERO,
    SHARED,
    WHOLE_DOTS,
    colors,
    layer,
    mark,
    numeric,
    panels,
    rounded,
    rule,
    tip,
)
from etr.report.results import Results, Row
from etr.report.spec import Chart, Missing, Numbers, Plot, Spec
from etr.report.statistics import mean, t_interval
from etr.report.summary import loss_note, summarize

_LABEL = "difference (nats/token)"


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A variant's difference at one step."""

    step: float
    deltas: tuple[float, ...]
    """By seed, both of the pair evaluated at this step."""

    @property
    def mean(self) -> float:
        return mean(self.deltas)

    @property
    def band(self) -> tuple[float, float]:
        """95 % t-interval; the mean itself where one seed gives none."""
        return t_interval(self.deltas) or (self.mean, self.mean)


def _draw(results: Results) -> Plot | Missing:
    if not results.is_comparison:
        return Missing("the runs belong to no comparison, or to several")
    base, *others = results.names
    incomparable = summarize(results).incomparable
    found = {
        name: points
        for name in others
        if name not in incomparable and (points := _points(results.of(name), results.of(base)))
    }
    if not found:
        return Missing("no variant was evaluated during training at the steps of the baseline")
    shown = list(found)[:MOST_RUNS]
    return Plot(
        chart=_chart(results, {name: found[name] for name in shown}),
        caption=f"Held-out loss minus that of {base} at the same step and seed, experts selected as"
        " served; below 0 is better. Line: mean over seeds. Band: its 95 % t-interval, where there"
        f" are several seeds.{too_many(list(found))}"
        f"{not_shown(results, [base, *found, *incomparable])}"
        f"{loss_note(results)}",
        numbers=Numbers(
            columns=("run", "step", "seeds", _LABEL, "interval from", "interval to"),
            rows=[
                (name, p.step, len(p.deltas), p.mean, *(t_interval(p.deltas) or (None, None)))
                for name, points in found.items()
                for p in points
            ],
        ),
        title=f"Difference from {base} over steps",
        wide=True,
    )


def _points(rows: tuple[Row, ...], baseline: tuple[Row, ...]) -> list[_Point]:
    """Every step at which all pairs of seeds were evaluated, that of the start left out."""
    pick = evaluation_curve()
    theirs = {row.seed: curve for row in baseline if (curve := pick(row))}
    pairs = [
        (dict(zip(ours.x, ours.y, strict=True)), dict(zip(them.x, them.y, strict=True)))
        for row in rows
        if (ours := pick(row)) and (them := theirs.get(row.seed))
    ]
    steps = set.intersection(*(a.keys() & b.keys() for a, b in pairs)) if pairs else set()
    return [
        _Point(step=float(step), deltas=tuple(float(a[step] - b[step]) for a, b in pairs))
        for step in sorted(steps)
    ]


def _chart(results: Results, found: dict[str, list[_Point]]) -> Chart:
    records: list[dict[str, Any]] = [
        {
            "panel": name,
            "variant": name,
            "x": rounded(p.step for p in points),
            "y": rounded(p.mean for p in points),
            "low": rounded(p.band[0] for p in points),
            "high": rounded(p.band[1] for p in points),
        }
        for name, points in found.items()
    ]
    scale = {"domain": list(_range(list(found.values()))), "nice": False}
    y = numeric("y", _LABEL, format="+.3~f", labelExpr=PLAIN_ZERO, scale=scale)
    ends = {"low": ("interval from", "+.4f"), "high": ("interval to", "+.4f")}
    dot = {"filled": True, "size": 40, "opacity": 1}
    spec = {
        "encoding": {
            "x": numeric("x", STEPS, format="~s", tickCount=4, scale={"zero": False, **WHOLE_DOTS}),
            "y": y,
            "color": colors(results, found)["color"] | SHARED,
            "tooltip": tip(x=("step", ","), y=(_LABEL, "+.4f"), **ends),
        },
        "layer": [
            layer(
                mark("area", opacity=0.2, clip=True), y=y | {"field": "low"}, y2={"field": "high"}
            ),
            rule("y", 0),
            layer(mark("line", strokeWidth=1.9, clip=True, point=dot)),
        ],
    }
    flat = [{"flatten": ["x", "y", "low", "high"]}]
    return panels(records, spec, height=190, least=230, transform=flat)


def _range(found: list[list[_Point]]) -> tuple[float, float]:
    """Of the vertical axis: all that follows the first step, and 0."""
    points = [p for some in found for p in (some[1:] if len(some) > 2 else some)]
    values = np.array([0.0, *(p.mean for p in points)])
    ends = np.array([end for p in points for end in p.band] or [0.0])
    reach = max(2.5 * float(np.abs(values).max()), 1e-3)
    low, high = max(float(ends.min()), -reach), min(float(ends.max()), reach)
    low, high = min(low, float(values.min())), max(high, float(values.max()))
    room = 0.08 * (high - low)
    return low - room, high + room


SPEC = Spec(
    "difference", "Difference from the baseline over steps", "Quality", _draw, compares=True
)
