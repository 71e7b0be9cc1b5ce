"""Held-out loss against step time and against the share of choices kept."""

from typing import Any

from etr.report.marks import colors, numeric, panels, rounded, tip
from etr.report.results import Results
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.summary import VariantSummary, causality_note, summarize

_PANELS = (
    ("step_time_seconds_median", "step time (ms)", 1e3),
    ("kept_fraction", "choices kept in training (%)", 1e2),
)


def _draw(results: Results) -> Plot | Missing:
    variants = summarize(results).variants
    records = [
        _record(variant, *panel)
        for panel in _PANELS
        for variant in variants
        if panel[0] in variant.estimates and "val_loss" in variant.estimates
    ]
    if not records:
        return Missing(
            reason="no run has a held-out loss together with a step time or a kept share"
        )
    titles = dict.fromkeys(record["panel"] for record in records)
    names = list(dict.fromkeys(record["variant"] for record in records))
    loss = "held-out loss (nats/token)"
    look = colors(results, names, shape=True)
    spec = {
        "encoding": {
            "x": numeric("x", None, grid=True, tickCount=4),
            "y": numeric("y", loss),
            "color": look["color"],
        },
        "layer": [
            {"mark": {"type": "rule"}, "encoding": {"x": {"field": "x0", "type": "quantitative"},
                                                    "x2": {"field": "x1"}}},
            {"mark": {"type": "rule"}, "encoding": {"y": {"field": "y0", "type": "quantitative"},
                                                    "y2": {"field": "y1"}}},
            {
                "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                "encoding": {
                    "shape": look["shape"],
                    "tooltip": tip(
                        ("variant", "variant", None),
                        ("panel", "x", None),
                        ("x", "x value", ",.4~f"),
                        ("y", loss, ".4f"),
                    )
                },
            },
        ],
    }  # fmt: skip
    return Plot(
        chart=panels(records, spec, height=250, least=200, independent=("x",)),
        caption="Down and to the left is better: less loss for less time or work. Markers: means"
        " over seeds; lines: ranges. Step time is the median of a run."
        f"{causality_note(results)}",
        numbers=Numbers(
            columns=(
                *("run", "seed", "held-out loss (nats/token)"),
                *(title for _, title, _ in _PANELS if title in titles),
            ),
            rows=[
                (
                    row.name,
                    row.seed,
                    row.values["val_loss"],
                    *(
                        None if (v := row.values[field]) is None else v * scale
                        for field, title, scale in _PANELS
                        if title in titles
                    ),
                )
                for row in results.rows
            ],
        ),
    )


def _record(variant: VariantSummary, field: str, title: str, scale: float) -> dict[str, Any]:
    x, y = variant.estimates[field], variant.estimates["val_loss"]
    places = rounded((x.mean * scale, x.low * scale, x.high * scale, y.mean, y.low, y.high))
    return {
        "panel": title,
        "variant": variant.name,
        **dict(zip(("x", "x0", "x1", "y", "y0", "y1"), places, strict=True)),
    }


SPEC = Spec(
    key="gains-and-costs",
    title="What it gains and what it costs",
    section="Quality",
    draw=_draw,
    compares=True,
)
