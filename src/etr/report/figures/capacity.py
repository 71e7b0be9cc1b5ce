"""Capacity of experts: as a factor, and in tokens against its lower bound."""

from dataclasses import replace

from etr.report.curves import gather, layer_curve, thin, train_curve
from etr.report.figure import add_legend, direct_label, new_figure
from etr.report.lines import MOST_POINTS_IN_ALL, curve_numbers, label_steps, log_values, not_shown
from etr.report.results import Results
from etr.report.spec import Missing, Plot, Spec
from etr.report.style import variant_style
from etr.report.wording import TIMES


def _factor(results: Results) -> Plot | Missing:
    pick = train_curve("capacity_factor")
    variants = gather(results, pick)
    if not variants:
        return Missing(reason="no run limits its experts by a capacity")
    figure = new_figure()
    (axes,) = figure.axes
    for variant in variants:
        line = thin(variant.line, MOST_POINTS_IN_ALL // max(len(variants), 15))
        axes.plot(
            line.x,
            line.y,
            color=variant.style.color,
            linestyle=variant.style.linestyle,
            marker=variant.style.marker if line.x.size == 1 else None,
        )
    axes.margins(y=0.08)
    axes.set_ylabel(f"capacity factor ({TIMES} even share)")
    label_steps(axes)
    add_legend(figure, [(v.name, v.style) for v in variants], markers=False)
    return Plot(
        figure=figure,
        caption="Tokens that an expert may keep, in multiples of choices / experts; mean over"
        f" seeds and layers.{not_shown(results, [v.name for v in variants])}",
        numbers=curve_numbers(results, {"capacity factor": pick}),
    )


def _against_bound(results: Results) -> Plot | Missing:
    count = max(
        (
            curves.shape[1]
            for row in results.rows
            if row.metrics
            if (curves := row.metrics.layers.get("capacity_lower_bound")) is not None
        ),
        default=0,
    )
    layers = sorted({0, count - 1}) if count else []
    bounded = {
        variant.name
        for layer in layers
        for variant in gather(results, layer_curve("capacity_lower_bound", layer))
    }
    if not bounded:
        return Missing(reason="no run has a lower bound of its capacity; it needs cosine scores")
    figure = new_figure(1, len(layers))
    for axes, layer in zip(figure.axes, layers, strict=True):
        for field, dashes in (("capacity", "solid"), ("capacity_lower_bound", ":")):
            for variant in gather(results, layer_curve(field, layer)):
                if variant.name in bounded:
                    line = thin(variant.line, 300)
                    axes.plot(
                        line.x,
                        line.y,
                        color=variant.style.color,
                        linestyle=dashes,
                        marker=variant.style.marker if line.x.size == 1 else None,
                    )
        log_values(axes)
        label_steps(axes)
        direct_label(axes, f"layer {layer}")
    figure.axes[0].set_ylabel("capacity (tokens/expert, log)")
    looks = [
        (name, replace(variant_style(index), dashes=()))
        for index, name in enumerate(results.names)
        if name in bounded
    ]
    add_legend(figure, looks, markers=False)
    picks = {
        f"{field}, layer {layer} (tokens)": layer_curve(field, layer)
        for layer in range(count)
        for field in ("capacity", "capacity_lower_bound")
    }
    return Plot(
        figure=figure,
        caption="Solid: most tokens an expert may keep. Dotted: the published lower bound, 1 / (E"
        " erfc z) with z from the chosen affinities and the width, which says something only in a"
        " narrow band of affinities. No solid line where nothing is dropped. Mean over seeds, first"
        f" and last MoE layer.{not_shown(results, sorted(bounded))}",
        numbers=curve_numbers(results, picks),
    )


FACTOR = Spec(
    key="capacity-factor",
    title="Capacity factor over training",
    section="Dropping",
    draw=_factor,
)
LOWER_BOUND = Spec(
    key="capacity-lower-bound",
    title="Capacity against its lower bound",
    section="Dropping",
    draw=_against_bound,
)
