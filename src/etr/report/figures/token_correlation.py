"""Correlation of tokens before and after training, ordered by the expert they chose."""

import numpy as np

from etr.report.found import first_of_each, too_many
from etr.report.lines import not_shown
from etr.report.marks import COSINES, ROWS, heat, panels, rounded, tip
from etr.report.observations import Array, Diagnostics
from etr.report.results import Results, Row
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.wording import clipped_inside

MOST_RUNS = 4
MOST_TOKENS = 16
"""Cells along a side: more tokens are averaged, for the page to stay small."""


def _before_and_after(row: Row) -> list[Diagnostics] | None:
    rows = row.metrics.diagnostics if row.metrics else ()
    found = [d for d in rows if d.token_correlation is not None]
    return ([found[0], found[-1]] if len(found) > 1 else found) or None


def _draw(results: Results) -> Plot | Missing:
    found = first_of_each(results, _before_and_after)
    if not found:
        return Missing("no run has correlations of tokens in its diagnostics")
    records = [
        {
            "panel": f"{clipped_inside(run.name, 22)}, step {d.step:,}",
            "variant": run.name,
            "row": token,
            "value": rounded(line),
        }
        for run in found[:MOST_RUNS]
        for d in run.value
        if d.token_correlation is not None
        for token, line in enumerate(averaged(d.token_correlation, MOST_TOKENS))
    ]
    told = tip(value=("correlation", ".3~f"))
    side, labels = "token, by expert", {"labels": False}
    spec = heat("correlation of features", COSINES, side, side, told, labels)
    return Plot(
        chart=panels(records, spec, height=200, least=200, transform=ROWS),
        wide=True,
        caption="Correlation of every two tokens over their features at the last MoE layer's input,"
        " tokens ordered by the expert they chose, at the first and the newest diagnostics. Blocks"
        " along the diagonal are tokens of one expert that resemble each other. First seed of each"
        f" variant.{too_many(found, MOST_RUNS)}{not_shown(results, found)}",
        numbers=Numbers(
            columns=("run", "step", "token", "expert", "other token", "correlation"),
            rows=[
                (run.name, d.step, a, _expert(d, a), b, round(float(value), 3) + 0.0)
                for run in found
                for d in run.value
                if d.token_correlation is not None
                for a, line in enumerate(d.token_correlation)
                for b, value in enumerate(line[a:], a)  # the other half is the same
            ],
        ),
    )


def averaged(matrix: Array, most: int) -> Array:
    """A matrix of at most `most` rows and columns, neighbours averaged; NaN where all are."""
    parts = np.array_split(np.arange(len(matrix)), min(most, len(matrix)))
    found = np.full((len(parts), len(parts)), np.nan)
    for i, rows in enumerate(parts):
        for j, columns in enumerate(parts):
            values = matrix[np.ix_(rows, columns)]
            values = values[np.isfinite(values)]
            found[i, j] = values.mean() if values.size else np.nan
    return found


def _expert(diagnostics: Diagnostics, token: int) -> int | None:
    experts = diagnostics.token_expert
    return experts[token] if token < len(experts) else None


SPEC = Spec(
    "token-correlation", "Correlation of tokens before and after training", "Specialisation", _draw
)
