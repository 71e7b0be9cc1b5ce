"""The all-to-all curve, and predicted steps, as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from etr.cluster.cost.pipeline import MARKS, Event
from etr.cluster.measure import NetworkCurve
from etr.report.chart import Drawing
from etr.report.lines import log_ticks
from etr.report.marks import layer, mark, named, nominal, numeric
from etr.report.spec import Chart, Numbers
from etr.report.style import CARD, SERIES


def curve_drawing(curve: NetworkCurve) -> Drawing:
    """Seconds of an exchange against bytes per rank, measured and fitted."""
    rows = [
        (size, seconds, curve.line.seconds(size))
        for size, seconds in zip(curve.sizes, curve.seconds, strict=True)
    ]
    return Drawing(
        key="all-to-all",
        title=f"An exchange of {len(curve.node_of_rank)} ranks",
        section="Time and memory",
        caption="Time of an all-to-all in equal parts, median over rounds; the line is the latency "
        f"{curve.line.latency_seconds * 1e3:.3g} ms plus the bytes at "
        f"{curve.line.bytes_per_second / 1e6:.4g} MB/s.",
        chart=_chart(rows),
        numbers=Numbers(columns=("bytes", "seconds", "fitted (s)"), rows=rows),
    )


def _chart(rows: list[tuple[int, float, float]]) -> Chart:
    fields = ("bytes", "measured", "fitted")
    times = [value for _, *values in rows for value in values if value > 0]
    low, high = min(times) / 1.1, max(times) * 1.1
    scale = {"type": "log", "domain": [low, high], "nice": False}
    axis = {"scale": scale, "values": log_ticks(low, high), "format": "~g"}
    y = numeric("fitted", "time until the last rank is done (s)", **axis)
    x = numeric("bytes", "sent by each rank (bytes)", scale={"type": "log", "base": 2}, format="~s")
    return {
        "data": {"values": [dict(zip(fields, row, strict=True)) for row in rows]},
        "height": 250,
        "encoding": {"x": x},
        "layer": [
            layer(mark("line", color=SERIES[2].css), y=y),
            layer(
                mark("point", color=SERIES[1].css, filled=True, opacity=1),
                y=y | {"field": "measured"},
            ),
        ],
    }


def timeline(steps: Mapping[str, Sequence[Event]]) -> Chart:
    """Steps of several routings, one below the other: what each stage does when.

    Args:
        steps: events by routing.
    """
    records = [
        {
            "row": f"{name}, stage {event.stage}",
            "kind": event.kind,
            "from": round(event.start_seconds, 6),
            "to": round(event.end_seconds, 6),
        }
        for name, events in steps.items()
        for event in sorted(events, key=lambda event: event.stage)
    ]
    looks = {kind: tint.css for kind, tint in zip(MARKS, SERIES[1:], strict=False)}
    order = dict.fromkeys(str(record["row"]) for record in records)
    return {
        "data": {"values": records},
        "height": {"step": 16},
        "encoding": {
            "y": nominal("row", order, axis={"labelLimit": 220, "title": None}),
            "x": numeric("from", "seconds since the step began", scale={"zero": True}),
            "x2": {"field": "to"},
            "color": named("kind", looks, columns=4),
        },
        "layer": [layer(mark("bar", height=12, stroke=CARD.css, strokeWidth=0.5))],
    }
