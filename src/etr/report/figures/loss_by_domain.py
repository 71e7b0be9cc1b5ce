"""Held-out loss of each domain, a dot per variant with its range over seeds."""

from collections.abc import Sequence

import numpy as np

from etr.report.dots import dot_chart
from etr.report.results import Results, Row
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.summary import loss_note

_LABEL = "held-out loss (nats/token)"


def _draw(results: Results) -> Plot | Missing:
    domains = list(dict.fromkeys(d for row in results.rows for d in row.val_loss_by_domain))
    table = {
        (name, domain): values
        for name in results.names
        for domain in domains
        if (values := _losses(results.of(name), domain))
    }
    if not table:
        return Missing("no run has a held-out loss by domain")
    dots = [
        (domain, name, float(np.mean(losses)), min(losses), max(losses))
        for (name, domain), losses in table.items()
    ]
    return Plot(
        chart=dot_chart(results, dots, domains, _LABEL),
        caption="Mean of the held-out loss over each domain's tokens, experts selected as served."
        f" Marker: mean over seeds. Line: range over seeds.{loss_note(results)}",
        numbers=Numbers(
            columns=("run", "seed", "domain", _LABEL),
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


SPEC = Spec("loss-by-domain", "Held-out loss by domain", "Quality", _draw)
