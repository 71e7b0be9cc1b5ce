"""Held-out loss against step time and against the share of choices kept."""

from typing import Any

from etr.report.marks import colors, layer, mark, numeric, panels, rounded, shapes, tip
from etr.report.results import Results
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.summary import VariantSummary, loss_note, summarize

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
        return Missing("no run has a held-out loss together with a step time or a kept share")
    titles = dict.fromkeys(record["panel"] for record in records)
    names = dict.fromkeys(record["variant"] for record in records)
    loss = "held-out loss (nats/token)"
    told = tip(panel=("x", None), x=("x value", ",.4~f"), y=(loss, ".4f"))
    spec = {
        "encoding": {
            "x": numeric("x", None, grid=True, tickCount=4),
            "y": numeric("y", loss),
            **colors(results, names),
        },
        "layer": [
            layer(mark("rule"), x=numeric("x0", None), x2={"field": "x1"}),
            layer(mark("rule"), y=numeric("y0", loss), y2={"field": "y1"}),
            layer(
                mark("point", filled=True, size=70, opacity=1),
                **shapes(results, names),
                tooltip=told,
            ),
        ],
    }
    return Plot(
        chart=panels(records, spec, height=250, least=200, transform=(), independent=("x",)),
        caption="Down and to the left is better: less loss for less time or work. Markers: means"
        " over seeds; lines: ranges. Step time is the median of a run."
        f"{loss_note(results)}",
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


SPEC = Spec("gains-and-costs", "What it gains and what it costs", "Quality", _draw, compares=True)
