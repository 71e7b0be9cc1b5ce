"""Scores of chosen experts against those of all the others: of the trained router, and before."""

from collections.abc import Sequence
from typing import Any

from etr.report.found import MOST_RUNS, first_of_each, too_many
from etr.report.histogram import Histogram, mean_histogram
from etr.report.lines import not_shown
from etr.report.marks import SHARED, colors, layer, mark, numeric, panels, rounded, tip
from etr.report.observations import Diagnostics
from etr.report.results import Results, Row
from etr.report.spec import Chart, Missing, Numbers, Plot, Spec
from etr.report.style import SOFT
from etr.report.wording import clipped_inside

_COLUMNS = ("run", "when", "score from", "score to", "density of chosen", "density of others")


def _trained(results: Results) -> Plot | Missing:
    found = [
        (name, histogram)
        for name in results.names
        if (histogram := mean_histogram([row.histogram for row in results.of(name)]))
    ]
    if not found:
        return Missing("no run has a histogram of its router's scores")
    shown = [
        (f"{clipped_inside(name, 24)}: {histogram.apart} apart", name, histogram)
        for name, histogram in found[:MOST_RUNS]
    ]
    return Plot(
        chart=_chart(results, shown),
        wide=True,
        caption="Filled: scores of the experts that held-out tokens chose. Grey line: scores of all"
        " the others. Densities, mean over seeds, with the distance of the two means; scores of"
        " different routers have different units."
        f"{too_many(found)}{not_shown(results, dict(found), 'no scores')}",
        numbers=Numbers(
            columns=_COLUMNS,
            rows=[line for name, h in found for line in _lines(name, "trained", h)],
        ),
    )


def _before_and_after(row: Row) -> list[tuple[int, Histogram]] | None:
    """The last layer's histogram in the first and the newest diagnostics, with their steps."""
    rows = row.metrics.diagnostics if row.metrics else ()
    found = [(d.step, h) for d in rows if (h := _last_layer(d))]
    return ([found[0], found[-1]] if len(found) > 1 else found) or None


def _last_layer(diagnostics: Diagnostics) -> Histogram | None:
    return diagnostics.layers[-1].affinity if diagnostics.layers else None


def _training(results: Results) -> Plot | Missing:
    found = first_of_each(results, _before_and_after)
    if not found:
        return Missing("no run has affinities in its diagnostics")
    shown = [
        (f"{clipped_inside(run.name, 20)}, step {step:,}", run.name, histogram)
        for run in found[: MOST_RUNS // 2]
        for step, histogram in run.value
    ]
    return Plot(
        chart=_chart(results, shown),
        wide=True,
        caption="Scores at the last MoE layer, at the first and the newest diagnostics. Filled: of"
        " each token's own experts, those it chose. Grey line: of all other experts. Densities in"
        f" the router's own unit; first seed of each variant.{too_many(found, MOST_RUNS // 2)}"
        f"{not_shown(results, found, 'no affinities')}",
        numbers=Numbers(
            columns=_COLUMNS,
            rows=[
                line
                for run in found
                for step, histogram in run.value
                for line in _lines(run.name, f"step {step}", histogram)
            ],
        ),
    )


def _chart(results: Results, shown: Sequence[tuple[str, str, Histogram]]) -> Chart:
    """A panel for each histogram: its heading, its variant, and itself."""
    records: list[dict[str, Any]] = [
        {"panel": panel, "variant": name, "kind": kind, "x": x, "y": rounded([*y, y[-1]])}
        for panel, name, histogram in shown
        for x in (rounded(histogram.edges),)
        for kind, y in (("own", histogram.own), ("others", histogram.others))
    ]
    names = dict.fromkeys(name for _, name, _ in shown)
    steps = {"interpolate": "step-after"}
    told = tip(kind=("scores of", None), x=("score from", ".3~f"), y=("density", ".3~f"))
    spec = {
        "encoding": {
            "x": numeric("x", "score (the router's unit)", tickCount=4),
            "y": numeric("y", "density (1 / unit)", scale={"zero": True}, tickCount=3),
            "color": colors(results, names)["color"] | SHARED,
            "tooltip": told,
        },
        "layer": [
            layer(mark("line", strokeWidth=1.1, **steps), "others", color={"value": SOFT.css}),
            layer(mark("area", opacity=0.3, line={"strokeWidth": 1.4}, **steps), "own"),
        ],
    }
    return panels(records, spec, independent=("x", "y"), between=52)


def _lines(name: str, when: str, histogram: Histogram) -> list[tuple[object, ...]]:
    edges = [float(edge) for edge in histogram.edges]
    return [
        (name, when, low, high, float(own), float(others))
        for low, high, own, others in zip(
            edges[:-1], edges[1:], histogram.own, histogram.others, strict=True
        )
    ]


TRAINED = Spec(
    "score-histograms",
    "Router scores: chosen experts against the others",
    "Specialisation",
    _trained,
)
TRAINING = Spec(
    "affinity-histograms", "Affinities before and after training", "Specialisation", _training
)
