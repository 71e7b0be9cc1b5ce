"""Figures of the quality page, from the same rows as its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etr.report.chart import save_svg
from etr.report.marks import layer, mark, named, nominal, numeric, panels
from etr.report.spec import Chart
from etr.report.statistics import mean, t_interval
from etr.report.style import SERIES, SOFT, looks
from etr.study.collection import Collection
from etr.study.summary import StudyRow

SHAPES = {"steps": "circle", "expert_flops": "square", "seconds": "triangle-up"}
NAMES = {"steps": "equal steps", "expert_flops": "equal expert FLOPs", "seconds": "equal time"}
FRAMES = ("linear", "fixed", "learned", "orthonormal")
FACTORS = (1.1, 0.6, 0.4, 0.2)
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
    for place, router in enumerate(FRAMES):
        for factor in FACTORS:
            row = study.row("text-x", f"{router}-{factor}")
            if row is not None:
                value, width = _spread(row)
                places = {"y": value, "low": value - width, "high": value + width}
                # Side by side, for intervals not to cover each other.
                records.append({"router": router, "x": factor + 0.012 * (place - 1.5), **places})
    if not records:
        return None
    tints = dict(zip(FRAMES, (tint.css for tint in SERIES), strict=False))
    dot = {"filled": True, "size": 40}
    axis = {"values": FACTORS, "format": ".1f", "scale": {"domain": (0.12, 1.18)}}
    return {
        "data": {"values": records},
        "height": 280,
        "encoding": {
            "x": numeric("x", "capacity factor (ranked by score, equal steps)", **axis),
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
    records: list[dict[str, Any]] = []
    for task, match, rows in study.blocks.values():
        for row in rows:
            flops = row.average("expert_flops") / base.average("expert_flops")
            loss = row.mean_loss()
            if task != "text-x" or loss is None or flops > 2:
                continue
            ours = row.name.startswith("etr") and row.name != "etr_paper"
            color = SERIES[1 if ours else 0].css
            point = {"x": flops, "y": loss, "name": row.name, "match": NAMES[match]}
            records.append({**point, "color": color})
    return _named(records, f"expert FLOPs of training over those of {reference}")


def costs(rows: Mapping[str, StudyRow], key: str) -> Chart:
    """Loss as served against what a step costs; coloured where no other row is better in both.

    Args:
        rows: by name.
        key: expert_flops, or step_seconds_median.
    """
    titles = {"expert_flops": "expert GFLOPs a step", "step_seconds_median": "seconds a step"}
    points = {}
    for name, row in rows.items():
        cost = row.average(key)
        points[name] = (1e-9 * cost / row.steps if key == "expert_flops" else cost, _spread(row)[0])
    return front(points, titles[key])


def front(points: Mapping[str, tuple[float, float]], title: str) -> Chart:
    """Costs and losses, coloured where no other point is better in both.

    Args:
        points: by name.
        title: of the cost's axis.
    """
    records: list[dict[str, Any]] = []
    for name, (x, y) in points.items():
        beaten = any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
        point = {"x": x, "y": y, "name": name, "match": NAMES["steps"]}
        records.append({**point, "color": SERIES[0 if beaten else 1].css})
    return _named(records, title)


def _named(records: list[dict[str, Any]], title: str) -> Chart:
    """Points with their names beside them, over a horizontal axis of a title."""
    records.sort(key=lambda record: -record["y"])
    for record, place in zip(records, _apart(records), strict=True):
        record["label"] = place
    return {
        "data": {"values": records},
        "height": 420,
        "encoding": {"x": numeric("x", title), "y": numeric("y", LOSS)},
        "layer": [
            layer(
                mark("point", filled=True, size=46, opacity=1),
                shape=_shape(),
                color={"field": "color", "type": "nominal", "scale": None},
            ),
            layer(
                mark("text", align="left", baseline="middle", dx=6, fontSize=8, color=SOFT.css),
                y=numeric("label", LOSS),
                text=nominal("name"),
            ),
        ],
    }


def _apart(records: Sequence[dict[str, Any]]) -> list[float]:
    """Heights of names beside points, of which the highest comes first: none over another."""
    wide, high = (max(r[k] for r in records) - min(r[k] for r in records) for k in ("x", "y"))
    letter, line = 5 * wide / 400, 8 * high / 400  # sizes of the text in the axes' units
    found: list[tuple[float, float, float]] = []
    for record in records:
        left, right, y = record["x"], record["x"] + letter * len(record["name"]), record["y"]
        while any(a < right and left < b and abs(y - at) < line for a, b, at in found):
            y -= line / 10
        found.append((left, right, y))
    return [y for _, _, y in found]


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
                line = {"panel": task, "variant": row.name, "match": NAMES[match]}
                records += [{**line, "x": at, "y": loss} for at, loss in points]
    return _panels(records, reference) if records else None


def _panels(records: Sequence[dict[str, Any]], reference: str) -> Chart:
    """A panel for each task."""
    found = looks(record["variant"] for record in records)
    tints = {name: look.tint.css for name, look in found.items()}
    spec = layer(
        mark("line", point={"filled": True, "size": 36}),
        x=numeric("x", f"time over that of {reference}"),
        y=numeric("y", LOSS),
        detail=nominal("match"),
        shape=_shape(),
        color=named("variant", tints, columns=4),
    )
    return panels(records, spec, height=300, transform=(), independent=("y",))


def _shape() -> dict[str, Any]:
    return named("match", {NAMES[match]: shape for match, shape in SHAPES.items()})
