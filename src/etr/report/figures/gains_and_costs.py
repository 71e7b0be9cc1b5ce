"""Held-out loss against step time and against the share of choices kept."""

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from etr.report.figure import add_legend, new_figure
from etr.report.results import Results
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.style import variant_style
from etr.report.summary import SeedEstimate, VariantSummary, causality_note, summarize

_PANELS = (
    ("step_time_seconds_median", "step time (ms)", 1e3),
    ("kept_fraction", "choices kept in training (%)", 1e2),
)


def _draw(results: Results) -> Plot | Missing:
    variants = summarize(results).variants
    panels = [panel for panel in _PANELS if any(_has(variant, panel[0]) for variant in variants)]
    if not panels:
        return Missing(
            reason="no run has a held-out loss together with a step time or a kept share"
        )
    figure = new_figure(1, len(panels), height=3.1)
    for axes, (field, label, scale) in zip(figure.axes, panels, strict=True):
        for index, variant in enumerate(variants):
            if _has(variant, field):
                _draw_point(axes, index, variant.estimates[field], variant, scale)
        axes.grid(axis="both")
        axes.margins(0.12)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel("held-out loss (nats/token)")
    for axes in figure.axes[1:]:
        axes.sharey(figure.axes[0])
        axes.tick_params(labelleft=False)
    add_legend(figure, [(v.name, variant_style(i)) for i, v in enumerate(variants)], lines=False)
    return Plot(
        figure=figure,
        caption="Down and to the left is better: less loss for less time or work. Markers: means"
        " over seeds; lines: ranges. Step time is the median of a run."
        f"{causality_note(results)}",
        numbers=Numbers(
            columns=("run", "seed", "held-out loss (nats/token)", *(p[1] for p in panels)),
            rows=[
                (
                    row.name,
                    row.seed,
                    row.values["val_loss"],
                    *(None if (v := row.values[f]) is None else v * s for f, _, s in panels),
                )
                for row in results.rows
            ],
        ),
    )


def _has(variant: VariantSummary, field: str) -> bool:
    return field in variant.estimates and "val_loss" in variant.estimates


def _draw_point(
    axes: Axes, index: int, x: SeedEstimate, variant: VariantSummary, scale: float
) -> None:
    look, y = variant_style(index), variant.estimates["val_loss"]
    left, centre, right = (value * scale for value in (x.low, x.mean, x.high))
    axes.plot([left, right], [y.mean, y.mean], color=look.color, linewidth=1.1)
    axes.plot([centre, centre], [y.low, y.high], color=look.color, linewidth=1.1)
    axes.plot([centre], [y.mean], color=look.color, marker=look.marker, markersize=6)


SPEC = Spec(
    key="gains-and-costs", title="What it gains and what it costs", section="Quality", draw=_draw
)
