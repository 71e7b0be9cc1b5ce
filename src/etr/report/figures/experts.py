"""What experts are for: which domains choose them, and how much they resemble each other."""

import numpy as np

from etr.report.found import MOST_RUNS, first_of_each, last_diagnostics, too_many
from etr.report.lines import not_shown
from etr.report.marks import COSINES, LOADS, ROWS, heat, panels, rounded, tip
from etr.report.observations import Array, Diagnostics, LayerDiagnostics
from etr.report.results import Results, Row
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.wording import TIMES, clipped, clipped_inside, fixed

MOST_EXPERTS = 24
"""Experts of which a figure of pairs shows cosines; the numbers have all."""
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
        return Missing("no run counts its domains' choices in its diagnostics")
    shown = found[:MOST_RUNS]
    records = [
        {
            "panel": _panel(run.name, run.value[1].mutual_information_bits, 3, " bits"),
            "variant": run.name,
            "row": clipped(domain, 22),
            "value": rounded(line),
        }
        for run in shown
        for domain, line in zip(run.value[0].domains, relative_choice(run.value[2]), strict=True)
    ]
    title = f"choices ({TIMES} even share)"
    told = tip(row=("domain", None), column=("expert", "d"), value=(title, ".3~f"))
    return Plot(
        chart=panels(
            records,
            heat(title, LOADS, "expert", "", told),
            height=max(160, 16 * max(len(run.value[2]) for run in shown)),
            least=300,
            transform=ROWS,
            independent=("x", "y"),
            between=110,
        ),
        wide=True,
        caption="How often held-out tokens of a domain choose each expert of the last MoE layer,"
        " over an even share; newest diagnostics, first seed. Bits: mutual information of domain"
        " and expert, 0 where experts ignore the domain."
        f"{too_many(found)}{not_shown(results, found)}",
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
        return Missing("no run has the similarity of its experts in its diagnostics")
    shown = found[:MOST_RUNS]
    records = [
        {"panel": panel, "variant": run.name, "row": expert, "value": rounded(line)}
        for run in shown
        for panel in (_panel(run.name, off_diagonal_mean(run.value[2]), 2),)
        for expert, line in enumerate(run.value[2][:MOST_EXPERTS, :MOST_EXPERTS])
    ]
    told = tip(row=("expert", "d"), column=("other expert", "d"), value=("cosine", ".3~f"))
    spec = heat("cosine of outputs", COSINES, "expert", "expert", told)
    return Plot(
        chart=panels(records, spec, height=180, transform=ROWS, independent=("x", "y"), between=50),
        wide=True,
        caption="Cosine of what every two experts of the last MoE layer give for the same held-out"
        " tokens, mean over tokens; the number is the mean over pairs of different experts. Newest"
        f" diagnostics, first seed.{too_many(found)}"
        f"{not_shown(results, found)}",
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


def _panel(name: str, value: float | None, digits: int, unit: str = "") -> str:
    """The heading of a panel: whose it is, and the one number of it."""
    return clipped_inside(name, 26) + ("" if value is None else f": {fixed(value, digits)}{unit}")


BY_DOMAIN = Spec(
    "expert-by-domain", "Which domains choose which experts", "Specialisation", _by_domain
)
SIMILARITY = Spec(
    "expert-similarity", "How much experts resemble each other", "Specialisation", _by_similarity
)
