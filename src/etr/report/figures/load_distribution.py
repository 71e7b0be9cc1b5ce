"""How even the load is at the end: its distribution over experts, and utilisation over training."""

import math

import numpy as np

from etr.report.curves import Curve, clean
from etr.report.found import Found, first_of_each
from etr.report.lines import not_shown, plot_curve
from etr.report.marks import colors, layer, mark, nominal, numeric, panels, rounded, tip
from etr.report.observations import Array
from etr.report.results import Results, Row
from etr.report.spec import Chart, Missing, Numbers, Plot, Spec
from etr.report.style import AXIS
from etr.report.wording import TIMES

LAST_STEPS = 100
MOST_STEPS = 120
"""Points of a distribution that a page holds of each variant."""


def _load(row: Row) -> Array | None:
    """Choices of every expert of every layer over its layer's mean, ascending, [layers * E]."""
    if row.metrics is None or row.metrics.choices is None:
        return None
    counts = row.metrics.choices[-LAST_STEPS:].sum(axis=0)
    means = counts.mean(axis=1, keepdims=True)
    if not (means > 0).all():
        return None
    return np.sort((counts / means).ravel())


def _distribution(results: Results) -> Plot | Missing:
    found = first_of_each(results, _load)
    if not found:
        return Missing("no run has choices per expert in its metrics")
    return Plot(
        chart=_chart(results, found),
        caption=f"Choices of each expert of each layer, summed over the last {LAST_STEPS} logged"
        " steps and divided by the mean of its layer. Load: share of experts with at most that"
        " load, and faint the normal distribution of the same spread. Concentration: share of all"
        " choices that the most loaded experts hold; the diagonal is an even load. First seed of"
        f" each variant.{not_shown(results, found)}",
        numbers=Numbers(
            columns=("run", "seed", "load over mean", "share of experts with at most that"),
            rows=[
                (run.name, run.row.seed, float(load), (place + 1) / run.value.size)
                for run in found
                for place, load in enumerate(run.value)
            ],
        ),
        wide=True,
    )


def _chart(results: Results, found: list[Found[Array]]) -> Chart:
    loads = f"load ({TIMES} mean of layer): share of experts up to it"
    shares = "experts, most loaded first: their share of choices"
    records = [
        {"panel": (loads, shares)[panel], "variant": run.name, "kind": kind, "x": x, "y": y}
        for run in found
        for panel, kind, *line in _curves(run.value)
        for x, y in ([rounded(_thinned(values)) for values in line],)
    ]
    color = colors(results, [run.name for run in found])["color"]
    spec = layer(
        mark("line"),
        x=numeric("x", None, format=".3~f", tickCount=5),
        y=numeric("y", None, format=".0%", scale={"domain": [0, 1.02], "nice": False}),
        detail=nominal("kind"),
        color={"condition": {"test": "datum.kind == 'even'", "value": AXIS.css}, **color},
        strokeWidth={"condition": {"test": "datum.kind == 'own'", "value": 1.8}, "value": 0.9},
        tooltip=tip(x=("x", ".3~f"), y=("share", ".1%")),
    )
    return panels(records, spec, height=230, least=300, independent=("x",))


def _curves(load: Array) -> list[tuple[int, str, Array, Array]]:
    """Panel, kind, x and y of each line of a variant."""
    share = np.arange(1, load.size + 1) / load.size
    spread = max(float(load.std()), 1e-3)
    grid = np.linspace(0, float(load[-1]) * 1.05, 60)
    normal = np.array([0.5 * (1 + math.erf((x - 1) / (spread * math.sqrt(2)))) for x in grid])
    held = np.concatenate([[0.0], np.cumsum(load[::-1])]) / load.sum()
    ends = np.array([0.0, 1.0])
    return [
        (0, "own", np.concatenate([[0.0], np.repeat(load, 2)]), np.repeat([0.0, *share], 2)[:-1]),
        (0, "normal", grid, normal),
        (1, "own", np.linspace(0, 1, held.size), held),
        (1, "even", ends, ends),
    ]


def _thinned(values: Array) -> Array:
    if values.size <= MOST_STEPS:
        return values
    return values[np.linspace(0, values.size - 1, MOST_STEPS).round().astype(int)]


def _filled(row: Row) -> Curve | None:
    """Kept tokens over the room that experts had, mean over layers.

    Where every layer has a capacity, that is the room. Where there is none, it is the load of the
    expert that keeps most, since the others wait for it.
    """
    metrics = row.metrics
    if metrics is None or metrics.kept is None:
        return None
    busiest = metrics.kept.max(axis=2)
    even = np.divide(
        metrics.kept.mean(axis=2), busiest, out=np.zeros(busiest.shape), where=busiest > 0
    ).mean(axis=1)
    per_choice, factor = metrics.train["kept_per_choice"], metrics.train["capacity_factor"]
    # Both are over the same choices, so that their ratio is tokens over capacity.
    kept = np.where(np.isnan(per_choice), metrics.train["kept_fraction"], per_choice)
    full = np.divide(kept, factor, out=np.full(len(kept), np.nan), where=factor > 0)
    capacity = metrics.layers.get("capacity", np.full(busiest.shape, np.nan))
    limited = np.isfinite(capacity).all(axis=1) & np.isfinite(full)
    return clean(metrics.step.astype(np.float64), np.where(limited, full, even))


def _utilisation(results: Results) -> Plot | Missing:
    return plot_curve(
        results,
        _filled,
        label="utilisation (%)",
        caption="Tokens that experts kept over the tokens they had room for, mean over layers: room"
        " is the capacity, or where nothing is dropped the load of the busiest expert, for whom the"
        " others wait",
        lacking="no run has kept tokens per expert in its metrics",
        percent=True,
    )


DISTRIBUTION = Spec("load-distribution", "Distribution of load over experts", "Load", _distribution)
UTILISATION = Spec("utilisation", "Utilisation of experts", "Load", _utilisation)
