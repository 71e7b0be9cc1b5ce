"""How even the load is at the end: its distribution over experts, and utilisation over training."""

import math

import numpy as np

from etr.report.curves import Curve, clean
from etr.report.figure import add_legend, direct_label, new_figure
from etr.report.lines import not_shown, plot_curve
from etr.report.matrices import first_of_each
from etr.report.observations import Array
from etr.report.results import Results, Row
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.style import AXIS, variant_style
from etr.report.wording import TIMES, percent

LAST_STEPS = 100


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
        return Missing(reason="no run has choices per expert in its metrics")
    figure = new_figure(1, 2, height=2.9)
    left, right = figure.axes
    for run in found:
        look, load = variant_style(run.index), run.value
        share = np.arange(1, load.size + 1) / load.size
        left.step(
            [0.0, *load], [0.0, *share], where="post", color=look.color, linestyle=look.linestyle
        )
        spread = max(float(load.std()), 1e-3)
        grid = np.linspace(0, float(load[-1]) * 1.05, 120)
        normal = [0.5 * (1 + math.erf((x - 1) / (spread * math.sqrt(2)))) for x in grid]
        left.plot(grid, normal, color=look.color, linewidth=0.8, alpha=0.5)
        held = np.concatenate([[0.0], np.cumsum(load[::-1])]) / load.sum()
        right.plot(np.linspace(0, 1, held.size), held, color=look.color, linestyle=look.linestyle)
    right.plot([0, 1], [0, 1], color=AXIS.light, linewidth=0.8)
    left.set_xlabel(f"load ({TIMES} mean of layer)")
    left.set_ylabel("experts with at most that (%)")
    right.set_xlabel("experts, most loaded first (%)")
    right.set_ylabel("their share of choices (%)")
    for axes in (left, right):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
        axes.set_ylim(0, 1.02)
    right.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}")
    direct_label(left, "ECDF, faint: normal CDF")
    direct_label(right, "cumulative load")
    add_legend(figure, [(r.name, variant_style(r.index)) for r in found], markers=False)
    return Plot(
        figure=figure,
        caption=f"Choices of each expert of each layer, summed over the last {LAST_STEPS} logged"
        " steps and divided by the mean of its layer. Left: share of experts with at most that"
        " load, and the normal distribution of the same spread. Right: share of all choices that"
        " the most loaded experts hold; the diagonal is an even load. First seed of each variant."
        f"{not_shown(results, [run.name for run in found])}",
        numbers=Numbers(
            columns=("run", "seed", "load over mean", "share of experts with at most that"),
            rows=[
                (run.name, run.row.seed, float(load), (place + 1) / run.value.size)
                for run in found
                for place, load in enumerate(run.value)
            ],
        ),
    )


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
        write=lambda value: percent(value, 0),
    )


DISTRIBUTION = Spec(
    key="load-distribution",
    title="Distribution of load over experts",
    section="Load",
    draw=_distribution,
)
UTILISATION = Spec(
    key="utilisation", title="Utilisation of experts", section="Load", draw=_utilisation
)
