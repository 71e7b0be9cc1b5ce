"""Held-out loss of each domain, a dot per variant with its range over seeds."""

from collections.abc import Sequence

import numpy as np

from etr.report.figure import add_legend, new_figure
from etr.report.results import Results, Row
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.style import variant_style
from etr.report.summary import causality_note
from etr.report.wording import clipped


def _draw(results: Results) -> Plot | Missing:
    domains = list(dict.fromkeys(d for row in results.rows for d in row.val_loss_by_domain))
    table = {
        (name, domain): values
        for name in results.names
        for domain in domains
        if (values := _losses(results.of(name), domain))
    }
    if not table:
        return Missing(reason="no run has a held-out loss by domain")
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
    return Plot(
        figure=figure,
        caption="Mean of the held-out loss over each domain's tokens, experts selected as served."
        f" Marker: mean over seeds. Line: range over seeds.{causality_note(results)}",
        numbers=Numbers(
            columns=("run", "seed", "domain", "held-out loss (nats/token)"),
            rows=[
                (row.name, row.seed, domain, loss)
                for row in results.rows
                for domain, loss in row.val_loss_by_domain.items()
            ],
        ),
    )


def _losses(rows: Sequence[Row], domain: str) -> list[float]:
    found = [row.val_loss_by_domain.get(domain) for row in rows]
    return [value for value in found if value is not None]


SPEC = Spec(key="loss-by-domain", title="Held-out loss by domain", section="Quality", draw=_draw)
