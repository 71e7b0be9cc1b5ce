"""What experts are for: which domains choose them, and how much they resemble each other."""

import numpy as np
from matplotlib.colors import Normalize, TwoSlopeNorm

from etr.report.figure import direct_label
from etr.report.lines import not_shown
from etr.report.matrices import (
    MOST_RUNS,
    color_scale,
    draw_matrix,
    first_of_each,
    last_diagnostics,
    panels,
    too_many,
)
from etr.report.observations import Array, Diagnostics, LayerDiagnostics
from etr.report.results import Results, Row
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.style import LOAD_MAP
from etr.report.wording import TIMES, clipped, fixed

_Measured = tuple[Diagnostics, LayerDiagnostics, Array]


def _domains(row: Row) -> _Measured | None:
    """The newest counts of the last layer, with where they come from."""

    def has(d: Diagnostics) -> _Measured | None:
        counts = d.layers[-1].domain_expert if d.layers else None
        if counts is None or len(counts) != len(d.domains) or not np.nansum(counts):
            return None
        return d, d.layers[-1], np.nan_to_num(counts)

    return last_diagnostics(row, has)


def relative_choice(counts: Array) -> Array:
    """How often a domain chooses an expert, over an even share: [D, E], 1 everywhere if even."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    return shares * counts.shape[1]


def _by_domain(results: Results) -> Plot | Missing:
    found = first_of_each(results, _domains)
    if not found:
        return Missing(reason="no run counts its domains' choices in its diagnostics")
    shown = found[:MOST_RUNS]
    tallest = max(len(run.value[2]) for run in shown)
    figure, grid = panels(len(shown), 1, 0.5 + 0.15 * tallest, above=0.6)
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=3.0)
    for axes, run in zip(grid.flat, shown, strict=True):
        diagnostics, layer, counts = run.value
        image = draw_matrix(axes, relative_choice(counts), LOAD_MAP, norm, aspect="auto")
        axes.set_yticks(range(len(counts)), [clipped(d, 16) for d in diagnostics.domains])
        bits = layer.mutual_information_bits
        direct_label(axes, run.name + (f": {fixed(bits, 3)} bits" if bits is not None else ""))
    grid.flat[-1].set_xlabel("expert")
    bar = color_scale(figure, image, f"choices ({TIMES} even share)", extend="max")
    bar.set_ticks([0, 0.5, 1, 2, 3])
    return Plot(
        figure=figure,
        caption="How often held-out tokens of a domain choose each expert of the last MoE layer,"
        " over an even share; newest diagnostics, first seed. Bits: mutual information of domain"
        " and expert, 0 where experts ignore the domain."
        f"{too_many(found)}{not_shown(results, [run.name for run in found])}",
        numbers=Numbers(
            columns=("run", "step", "layer", "domain", "expert", "choices"),
            rows=[
                (run.name, d.step, index, domain, expert, float(count))
                for run in found
                for d in (run.value[0],)
                for index, layer in enumerate(d.layers)
                if layer.domain_expert is not None
                for domain, line in zip(d.domains, layer.domain_expert, strict=False)
                for expert, count in enumerate(line)
            ],
        ),
    )


def _similarity(row: Row) -> _Measured | None:
    def has(d: Diagnostics) -> _Measured | None:
        matrix = d.layers[-1].expert_similarity if d.layers else None
        return None if matrix is None else (d, d.layers[-1], matrix)

    return last_diagnostics(row, has)


def off_diagonal_mean(matrix: Array) -> float | None:
    """Mean similarity of two different experts; None for a single one."""
    others = matrix[~np.eye(len(matrix), dtype=bool)]
    others = others[np.isfinite(others)]
    return float(others.mean()) if others.size else None


def _by_similarity(results: Results) -> Plot | Missing:
    found = first_of_each(results, _similarity)
    if not found:
        return Missing(reason="no run has the similarity of its experts in its diagnostics")
    shown = found[:MOST_RUNS]
    columns = min(3, max(len(shown), 2))
    figure, grid = panels(len(shown), columns, 1.4, above=0.3)
    for axes, run in zip(grid.flat, shown, strict=False):
        matrix = run.value[2]
        image = draw_matrix(axes, matrix, LOAD_MAP, Normalize(-1, 1))
        mean = off_diagonal_mean(matrix)
        direct_label(
            axes, clipped(run.name, 14) + (f": {fixed(mean, 2)}" if mean is not None else "")
        )
    for line in grid:
        line[0].set_ylabel("expert")
    bar = color_scale(figure, image, "cosine of outputs")
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    return Plot(
        figure=figure,
        caption="Cosine of what every two experts of the last MoE layer give for the same held-out"
        " tokens, mean over tokens; the number is the mean over pairs of different experts. Newest"
        f" diagnostics, first seed.{too_many(found)}"
        f"{not_shown(results, [run.name for run in found])}",
        numbers=Numbers(
            columns=("run", "step", "expert", "other expert", "cosine"),
            rows=[
                (run.name, run.value[0].step, a, b, float(value))
                for run in found
                for a, line in enumerate(run.value[2])
                for b, value in enumerate(line)
            ],
        ),
    )


BY_DOMAIN = Spec(
    key="expert-by-domain",
    title="Which domains choose which experts",
    section="Specialisation",
    draw=_by_domain,
)
SIMILARITY = Spec(
    key="expert-similarity",
    title="How much experts resemble each other",
    section="Specialisation",
    draw=_by_similarity,
)
