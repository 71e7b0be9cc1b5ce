"""Figures of the quality page, from the same rows as its tables."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from etr.report.chart import save_svg
from etr.report.marks import layer, mark, named, nominal, numeric, panels
from etr.report.spec import Chart
from etr.report.statistics import mean, t_interval
from etr.report.style import SERIES, SOFT
from etr.study.collection import Collection
from etr.study.summary import StudyRow

SHAPES = {"steps": "circle", "expert_flops": "square", "seconds": "triangle-up"}
NAMES = {"steps": "equal steps", "expert_flops": "equal expert FLOPs", "seconds": "equal time"}
FRAMES = ("linear", "fixed", "learned", "orthonormal")
LOSS = "held-out loss, nats per byte"


def draw(study: Collection, reference: str, folder: Path) -> dict[str, Path]:
    """Write every figure whose rows are there, as SVG; paths by title."""
    found = {}
    for name, title, make in (
        ("quality-capacity", "Held-out loss as served against capacity, text-x", _capacity),
        ("quality-front", "Held-out loss as served against expert compute, text-x", _front),
        ("quality-time", "Held-out loss as served against time, headline rows", _time),
    ):
        chart = make(study, reference)
        if chart is not None:
            found[title] = folder / f"{name}.svg"
            save_svg(chart, found[title])
    return found


def _spread(row: StudyRow) -> tuple[float, float]:
    """Mean loss and half-width of its interval."""
    values = list(row.losses().values())
    interval = t_interval(values)
    return mean(values), 0.0 if interval is None else (interval[1] - interval[0]) / 2


def _capacity(study: Collection, reference: str) -> Chart | None:
    records = []
    for router in FRAMES:
        for factor in (1.1, 0.6, 0.4, 0.2):
            row = study.row("text-x", f"{router}-{factor}")
            if row is not None:
                value, width = _spread(row)
                places = {"y": value, "low": value - width, "high": value + width}
                records.append({"router": router, "x": factor, **places})
    if not records:
        return None
    tints = dict(zip(FRAMES, (tint.css for tint in SERIES), strict=False))
    dot = {"filled": True, "size": 40}
    return {
        "data": {"values": records},
        "height": 280,
        "encoding": {
            "x": numeric("x", "capacity factor (ranked by score, equal steps)"),
            "color": named("router", tints, columns=4),
        },
        "layer": [
            layer(mark("line", point=dot), y=numeric("y", LOSS)),
            layer(mark("rule"), y=numeric("low", LOSS), y2={"field": "high"}),
        ],
    }


def _front(study: Collection, reference: str) -> Chart | None:
    base = study.row("text-x", reference)
    if base is None:
        return None
    records = []
    for task, match, rows in study.blocks.values():
        for row in rows:
            flops = row.average("expert_flops") / base.average("expert_flops")
            loss = row.mean_loss()
            if task != "text-x" or loss is None or flops > 2:
                continue
            ours = row.name.startswith("etr") and row.name != "etr_paper"
            color = SERIES[2 if ours else 0].css
            point = {"x": flops, "y": loss, "name": row.name, "match": NAMES[match]}
            records.append({**point, "color": color})
    return {
        "data": {"values": records},
        "height": 420,
        "encoding": {
            "x": numeric("x", f"expert FLOPs of training over those of {reference}"),
            "y": numeric("y", LOSS),
        },
        "layer": [
            layer(
                mark("point", filled=True, size=46, opacity=1),
                shape=_shape(),
                color={"field": "color", "type": "nominal", "scale": None},
            ),
            layer(
                mark("text", align="left", dx=5, dy=-4, fontSize=8, color=SOFT.css),
                text=nominal("name"),
            ),
        ],
    }


def _time(study: Collection, reference: str) -> Chart | None:
    tasks = [task for task in ("text-x", "lm") if task in study.times]
    if not tasks:
        return None
    records: list[dict[str, Any]] = []
    for task in tasks:
        base = study.row(task, reference)
        if base is None:
            return None
        for of, match, rows in study.blocks.values():
            for row in rows:
                ratio = study.seconds(task, row.name)
                if of != task or ratio is None or row.steps > 2 * base.steps:
                    continue
                curves = [result["curve"] for result in row.results]
                x = [ratio * point["step"] / base.steps for point in curves[0]]
                y = [mean([curve[i]["served_loss"] for curve in curves]) for i in range(len(x))]
                # The start, far above all that is compared, is left out.
                top = mean(list(base.losses().values())) + 0.4
                points = [pair for pair in zip(x, y, strict=True) if pair[1] <= top]
                line = {"panel": task, "name": f"{row.name} ({NAMES[match]})"}
                records += [
                    {**line, "match": NAMES[match], "x": at, "y": loss} for at, loss in points
                ]
    return _panels(records, reference) if records else None


def _panels(records: Sequence[dict[str, Any]], reference: str) -> Chart:
    """A panel for each task."""
    names = dict.fromkeys(record["name"] for record in records)
    tints = dict(zip(names, cycle(tint.css for tint in SERIES), strict=False))
    spec = layer(
        mark("line", point={"filled": True, "size": 36}),
        x=numeric("x", f"time over that of {reference}"),
        y=numeric("y", LOSS),
        shape=_shape(),
        color=named("name", tints, columns=2),
    )
    given = [{"variant": "", **record} for record in records]
    return panels(given, spec, height=300, transform=(), independent=("y",))


def _shape() -> dict[str, Any]:
    return named("match", {NAMES[match]: shape for match, shape in SHAPES.items()})
