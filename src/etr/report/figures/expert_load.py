"""Choices per expert over training: a heat map for every variant, of the first and last layer."""

from collections.abc import Sequence

import numpy as np

from etr.report.found import MOST_RUNS, Found, every_run, first_of_each, too_many
from etr.report.lines import STEPS, not_shown
from etr.report.marks import LOADS, heat, panels, rounded, tip
from etr.report.metrics import Metrics
from etr.report.observations import Array
from etr.report.results import Results, Row
from etr.report.spec import Chart, Missing, Numbers, Plot, Spec
from etr.report.wording import TIMES, clipped_inside

STEP_BINS = 120
MOST_CELLS = 1_900
"""Cells that a figure draws, for its page to stay small: fewer bins where experts are many."""


def draw_expert_load(results: Results, layers: Sequence[int] | None = None) -> Plot | Missing:
    """One panel per variant and layer.

    Args:
        results: the runs.
        layers: which layers, negative from the end; by default the first and the last. Never a
            mean over layers: experts of different layers have nothing in common, and a mean hides
            that each is skewed.
    """
    every, found = every_run(results, _choices), first_of_each(results, _choices)
    if not found:
        return Missing("no run has choices per expert in its metrics")
    shown = found[:MOST_RUNS]
    names = {run.name for run in shown}
    asked = {run.name: _layers(run.value.shape[1], layers) for run in shown}
    if not any(asked.values()):
        return Missing(f"no run has a layer of {list(layers or ())}")
    chart, bins = _chart(shown, asked)
    return Plot(
        chart=chart,
        caption="Choices of each expert before dropping, relative to the mean of its layer: 1 is an"
        f" even load. Steps averaged into at most {bins} bins; first seed of each variant."
        f"{_loss_settings(every)}{too_many(found)}"
        f"{not_shown(results, found)}",
        numbers=Numbers(
            columns=("run", "seed", "layer", "expert", "bin of steps", "load over mean"),
            rows=[
                (run.row.name, run.row.seed, layer, expert, place, round(float(load), 3))
                for run in every
                if run.row.name in names
                for layer in range(run.value.shape[1])
                for expert, line in enumerate(relative_load(run.value[:, layer]))
                for place, load in enumerate(line)
            ],
        ),
        wide=True,
    )


def _chart(shown: Sequence[Found[Array]], asked: dict[str, list[int]]) -> tuple[Chart, int]:
    """The panels, and the bins of steps in each."""
    lines = sum(len(asked[run.name]) * run.value.shape[2] for run in shown)
    bins = max(10, min(48, MOST_CELLS // lines))
    records = []
    for run in shown:
        steps = np.array_split(_metrics(run).step, min(bins, len(run.value)))
        for layer in asked[run.name]:
            suffix = f", layer {layer}" if run.value.shape[1] > 1 else ""
            records += [
                {
                    "panel": clipped_inside(run.name, 26) + suffix,
                    "variant": run.name,
                    "row": expert,
                    "value": rounded(line),
                    "column": [int(part[-1]) for part in steps],
                }
                for expert, line in enumerate(relative_load(run.value[:, layer], bins))
            ]
    title = f"choices ({TIMES} mean of experts)"
    told = tip(row=("expert", "d"), column=("steps to", ","), value=(title, ".3~f"))
    spec = heat(title, LOADS, STEPS, "expert", told, {"format": "~s"})
    flat = [{"flatten": ["value", "column"]}]
    height = max(160, min(10 * max(run.value.shape[2] for run in shown), 320))
    apart = ("x", "y")
    chart = panels(records, spec, height=height, transform=flat, independent=apart, between=50)
    return chart, bins


def relative_load(choices: Array, most_bins: int = STEP_BINS) -> Array:
    """Load relative to the mean of experts, steps averaged into bins: [S, E] -> [E, bins]."""
    bins = np.array_split(choices, min(most_bins, len(choices)))
    counts = np.stack([part.mean(axis=0) for part in bins])
    means = counts.mean(axis=1, keepdims=True)
    return np.divide(counts, means, out=np.zeros_like(counts), where=means > 0).T


def _draw(results: Results) -> Plot | Missing:
    return draw_expert_load(results)


def _choices(row: Row) -> Array | None:
    return row.metrics.choices if row.metrics else None


def _metrics(run: Found[Array]) -> Metrics:
    assert run.row.metrics is not None  # it has choices
    return run.row.metrics


def _layers(count: int, wanted: Sequence[int] | None) -> list[int]:
    asked = (0, -1) if wanted is None else wanted
    return list(dict.fromkeys(i % count for i in asked if -count <= i < count))


def _loss_settings(runs: Sequence[Found[Array]]) -> str:
    """Which router losses each variant was trained with, as one sentence."""
    settings: dict[str, list[str]] = {}
    for run in runs:
        setting = " + ".join(_metrics(run).losses) or "none"
        names = settings.setdefault(setting, [])
        if run.row.name not in names:
            names.append(run.row.name)
    told = "; ".join(f"{setting} ({', '.join(names)})" for setting, names in settings.items())
    return f" Router losses: {told}."


SPEC = Spec("expert-load", "Load of every expert over training", "Load", _draw)
