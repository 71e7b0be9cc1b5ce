"""Figures of the state of runs: load, scores, domains, and what is gained for what."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from etr.report.figure import Drawing, Skipped, add_legend, direct_label, new_figure
from etr.report.metrics import Array, Steps
from etr.report.results import Histogram, Results, Row
from etr.report.style import LOAD_MAP, SOFT, variant_style
from etr.report.summary import Estimate, VariantSummary, causality_note, summarize
from etr.report.wording import TIMES, clipped, listed, significant

STEP_BINS = 120
MOST_LOAD = 3.0


def expert_load(results: Results, layers: Sequence[int] | None = None) -> Drawing | Skipped:
    """Choices per expert over training, one panel per variant and layer.

    Args:
        results: the comparison.
        layers: which layers, negative from the end; by default the first and the last. Never a
            mean over layers: experts of different layers have nothing in common, and a mean hides
            that each is skewed.
    """
    key, title = "expert-load", "Load of every expert over training"
    runs = [
        (name, row.metrics.step, row.metrics.choices)
        for name in results.names
        if (row := _first_with_choices(results.of(name))) and row.metrics
        if row.metrics.choices is not None
    ]
    if not runs:
        return Skipped(key=key, title=title, reason="no run has choices per expert in its metrics")
    columns = max(len(_layers(choices.shape[1], layers)) for _, _, choices in runs)
    if columns == 0:
        return Skipped(key=key, title=title, reason=f"no run has a layer of {list(layers or ())}")
    figure = new_figure(len(runs), columns, height=1.0 + 0.95 * len(runs))
    grid = np.array(figure.axes).reshape(len(runs), columns)
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=MOST_LOAD)
    for line, (name, step, choices) in zip(grid, runs, strict=True):
        shown = _layers(choices.shape[1], layers)
        for axes, layer in zip(line, shown, strict=False):
            image = _draw_load(axes, step, choices[:, layer], norm)
            suffix = f", layer {layer}" if choices.shape[1] > 1 else ""
            direct_label(axes, clipped(name, 26) + suffix)
        for axes in line[len(shown) :]:
            axes.set_axis_off()
        line[0].set_ylabel("expert")
    for axes in grid[-1]:
        axes.set_xlabel("optimizer steps")
    bar = figure.colorbar(image, ax=figure.axes, fraction=0.035, extend="max")
    bar.set_label(f"choices ({TIMES} mean of experts)")
    bar.set_ticks([0, 0.5, 1, 2, 3])
    bar.outline.set_visible(False)
    absent = [name for name in results.names if name not in {run[0] for run in runs}]
    caption = (
        "Choices of each expert before dropping, relative to the mean of its layer: 1 is an even"
        f" load. Steps averaged into at most {STEP_BINS} bins; first seed of each variant."
        + (f" Not shown, no values: {listed(absent)}." if absent else "")
    )
    return Drawing(key=key, title=title, caption=caption, figure=figure)


def _first_with_choices(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.metrics and row.metrics.choices is not None), None)


def _layers(count: int, wanted: Sequence[int] | None) -> list[int]:
    asked = (0, -1) if wanted is None else wanted
    return list(dict.fromkeys(i % count for i in asked if -count <= i < count))


def relative_load(choices: Array, most_bins: int = STEP_BINS) -> Array:
    """Load relative to the mean of experts, steps averaged into bins: [S, E] -> [E, bins]."""
    bins = np.array_split(choices, min(most_bins, len(choices)))
    counts = np.stack([part.mean(axis=0) for part in bins])
    means = counts.mean(axis=1, keepdims=True)
    return np.divide(counts, means, out=np.zeros_like(counts), where=means > 0).T


def _draw_load(axes: Axes, step: Steps, choices: Array, norm: TwoSlopeNorm) -> AxesImage:
    load = relative_load(choices)
    # Half a step either side, so that a single step has an extent.
    extent = (float(step[0]) - 0.5, float(step[-1]) + 0.5, len(load) - 0.5, -0.5)
    image = axes.imshow(
        load, aspect="auto", cmap=LOAD_MAP, norm=norm, extent=extent, interpolation="none"
    )
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    return image


def score_histograms(results: Results) -> Drawing | Skipped:
    """Scores of chosen experts against those of all the others."""
    key, title = "score-histograms", "Router scores: chosen experts against the others"
    found = [
        (index, name, histogram)
        for index, name in enumerate(results.names)
        if (histogram := mean_histogram([row.histogram for row in results.of(name)]))
    ]
    if not found:
        return Skipped(key=key, title=title, reason="no run has a histogram of its router's scores")
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure = new_figure(rows, columns, height=0.7 + 1.75 * rows)
    for axes, (index, name, histogram) in zip(figure.axes, found, strict=False):
        color = variant_style(index).color
        axes.stairs(histogram.others, histogram.edges, color=SOFT.light, linewidth=1.1)
        axes.stairs(histogram.own, histogram.edges, fill=True, color=color, alpha=0.3)
        axes.stairs(histogram.own, histogram.edges, color=color, linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        direct_label(axes, f"{name}: means {_apart(histogram)} apart")
    for axes in figure.axes[len(found) :]:
        axes.set_axis_off()
    for place, axes in enumerate(figure.axes[: len(found)]):
        if place + columns >= len(found):
            axes.set_xlabel("score (the router's unit)")
        if place % columns == 0:
            axes.set_ylabel("density (1 / unit)")
    absent = [name for name in results.names if name not in {entry[1] for entry in found}]
    caption = (
        "Filled: scores of the experts that tokens chose. Grey line: scores of all the others."
        " Densities, mean over seeds; scores of different routers have different units."
        + (f" Not shown, no scores: {listed(absent)}." if absent else "")
    )
    return Drawing(key=key, title=title, caption=caption, figure=figure)


def mean_histogram(histograms: Sequence[Histogram | None]) -> Histogram | None:
    """Mean over the seeds that share the first one's bins."""
    present = [histogram for histogram in histograms if histogram is not None]
    if not present:
        return None
    same = [h for h in present if np.array_equal(h.edges, present[0].edges)]
    return Histogram(
        edges=present[0].edges,
        own=np.mean([h.own for h in same], axis=0),
        others=np.mean([h.others for h in same], axis=0),
    )


def _apart(histogram: Histogram) -> str:
    widths = np.diff(histogram.edges)
    centres = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    means = []
    for density in (histogram.own, histogram.others):
        mass = float((density * widths).sum())
        means.append(float((density * widths * centres).sum()) / mass if mass > 0 else np.nan)
    gap = means[0] - means[1]
    return significant(gap, 2) if np.isfinite(gap) else "not"


def loss_by_domain(results: Results) -> Drawing | Skipped:
    """Held-out loss of each domain, a dot per variant with its range over seeds."""
    key, title = "loss-by-domain", "Held-out loss by domain"
    domains = list(dict.fromkeys(d for row in results.rows for d in row.val_loss_by_domain))
    table = {
        (name, domain): values
        for name in results.names
        for domain in domains
        if (values := _domain_losses(results.of(name), domain))
    }
    if not table:
        return Skipped(key=key, title=title, reason="no run has a held-out loss by domain")
    names = results.names
    figure = new_figure(height=1.1 + len(domains) * max(0.42, 0.11 * len(names) + 0.12))
    (axes,) = figure.axes
    for index, name in enumerate(names):
        offset = 0.62 * ((index + 0.5) / len(names) - 0.5)
        look = variant_style(index)
        for place, domain in enumerate(domains):
            if losses := table.get((name, domain)):
                y, mean = place + offset, float(np.mean(losses))
                axes.plot([min(losses), max(losses)], [y, y], color=look.color, linewidth=1.3)
                axes.plot([mean], [y], color=look.color, marker=look.marker, markersize=4.8)
    axes.set_yticks(range(len(domains)), [clipped(domain, 24) for domain in domains])
    axes.set_ylim(len(domains) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.grid(axis="y", visible=False)
    for place in range(1, len(domains)):
        axes.axhline(place - 0.5, color=axes.xaxis.get_gridlines()[0].get_color(), linewidth=0.8)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("held-out loss (nats/token)")
    add_legend(figure, [(n, variant_style(i)) for i, n in enumerate(names)], lines=False)
    caption = (
        "Marker: mean over seeds. Line: range over seeds. Experts selected as served."
        f"{causality_note(results)}"
    )
    return Drawing(key=key, title=title, caption=caption, figure=figure)


def _domain_losses(rows: Sequence[Row], domain: str) -> list[float]:
    found = [row.val_loss_by_domain.get(domain) for row in rows]
    return [value for value in found if value is not None]


def gains_and_costs(results: Results) -> Drawing | Skipped:
    """Held-out loss against step time and against the share of choices kept."""
    key, title = "gains-and-costs", "What it gains and what it costs"
    variants = summarize(results).variants
    panels = [
        (field, label, scale)
        for field, label, scale in (
            ("step_time_seconds_median", "step time (ms)", 1e3),
            ("kept_fraction", "choices kept in training (%)", 1e2),
        )
        if any(_has(variant, field) for variant in variants)
    ]
    if not panels:
        reason = "no variant has a held-out loss together with a step time or a kept share"
        return Skipped(key=key, title=title, reason=reason)
    figure = new_figure(1, len(panels), height=3.1)
    for axes, (field, label, scale) in zip(figure.axes, panels, strict=True):
        for index, variant in enumerate(variants):
            if _has(variant, field):
                _draw_point(axes, index, variant.estimates[field], variant, scale)
        axes.grid(axis="both")
        axes.margins(0.12)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel("held-out loss (nats/token)")
    for axes in figure.axes[1:]:
        axes.sharey(figure.axes[0])
        axes.tick_params(labelleft=False)
    add_legend(figure, [(v.name, variant_style(i)) for i, v in enumerate(variants)], lines=False)
    caption = (
        "Down and to the left is better: less loss for less time or work. Markers: means over"
        " seeds; lines: ranges. Step time is the median of a run."
        f"{causality_note(results)}"
    )
    return Drawing(key=key, title=title, caption=caption, figure=figure)


def _has(variant: VariantSummary, field: str) -> bool:
    return field in variant.estimates and "val_loss" in variant.estimates


def _draw_point(axes: Axes, index: int, x: Estimate, variant: VariantSummary, scale: float) -> None:
    look, y = variant_style(index), variant.estimates["val_loss"]
    left, centre, right = (value * scale for value in (x.low, x.mean, x.high))
    axes.plot([left, right], [y.mean, y.mean], color=look.color, linewidth=1.1)
    axes.plot([centre, centre], [y.low, y.high], color=look.color, linewidth=1.1)
    axes.plot([centre], [y.mean], color=look.color, marker=look.marker, markersize=6)
