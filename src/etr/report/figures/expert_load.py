"""Choices per expert over training: a heat map for every run, and the first and last layer."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.image import AxesImage

from etr.report.figure import direct_label, new_figure
from etr.report.lines import not_shown
from etr.report.matrices import (
    MOST_RUNS,
    Found,
    color_scale,
    every_run,
    frameless,
    too_many,
)
from etr.report.metrics import Metrics, Steps
from etr.report.observations import Array
from etr.report.results import Results, Row
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.style import LOAD_MAP
from etr.report.wording import TIMES, clipped

STEP_BINS = 120
MOST_LOAD = 3.0


def draw_expert_load(results: Results, layers: Sequence[int] | None = None) -> Plot | Missing:
    """One panel per run and layer.

    Args:
        results: the runs.
        layers: which layers, negative from the end; by default the first and the last. Never a
            mean over layers: experts of different layers have nothing in common, and a mean hides
            that each is skewed.
    """
    found = every_run(results, _choices)
    if not found:
        return Missing(reason="no run has choices per expert in its metrics")
    shown = found[:MOST_RUNS]
    columns = max(len(_layers(run.value.shape[1], layers)) for run in shown)
    if columns == 0:
        return Missing(reason=f"no run has a layer of {list(layers or ())}")
    figure = new_figure(len(shown), columns, height=1.0 + 0.95 * len(shown))
    grid = np.array(figure.axes).reshape(len(shown), columns)
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=MOST_LOAD)
    for line, run in zip(grid, shown, strict=True):
        asked = _layers(run.value.shape[1], layers)
        for axes, layer in zip(line, asked, strict=False):
            image = _draw_load(axes, _metrics(run).step, run.value[:, layer], norm)
            suffix = f", layer {layer}" if run.value.shape[1] > 1 else ""
            direct_label(axes, clipped(run.name, 24) + suffix)
        for axes in line[len(asked) :]:
            axes.set_axis_off()
        line[0].set_ylabel("expert")
    for axes in grid[-1]:
        axes.set_xlabel("optimizer steps")
    bar = color_scale(figure, image, f"choices ({TIMES} mean of experts)", extend="max")
    bar.set_ticks([0, 0.5, 1, 2, 3])
    return Plot(
        figure=figure,
        caption="Choices of each expert before dropping, relative to the mean of its layer: 1 is an"
        f" even load. Steps averaged into at most {STEP_BINS} bins.{_loss_settings(shown)}"
        f"{too_many(found)}{not_shown(results, [run.row.name for run in found])}",
        numbers=Numbers(
            columns=("run", "seed", "layer", "expert", "bin of steps", "load over mean"),
            rows=[
                (run.row.name, run.row.seed, layer, expert, place, float(load))
                for run in shown
                for layer in range(run.value.shape[1])
                for expert, line in enumerate(relative_load(run.value[:, layer]))
                for place, load in enumerate(line)
            ],
        ),
    )


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


def _draw_load(axes: Axes, step: Steps, choices: Array, norm: TwoSlopeNorm) -> AxesImage:
    load = relative_load(choices)
    # Half a step either side, so that a single step has an extent.
    extent = (float(step[0]) - 0.5, float(step[-1]) + 0.5, len(load) - 0.5, -0.5)
    image = axes.imshow(
        load, aspect="auto", cmap=LOAD_MAP, norm=norm, extent=extent, interpolation="none"
    )
    frameless(axes)
    return image


SPEC = Spec(
    key="expert-load", title="Load of every expert over training", section="Load", draw=_draw
)
