"""What experts leave: dropped choices, tokens without an expert, the affinity mass that stays."""

from collections.abc import Sequence

from etr.report.curves import VariantCurves, layer_curve, smooth, train_curve
from etr.report.lines import plot_curve
from etr.report.results import Results
from etr.report.spec import Missing, Plot, Spec
from etr.report.wording import percent


def _drop_rate(results: Results) -> Plot | Missing:
    return plot_curve(
        results,
        train_curve("drop_rate"),
        label="dropped choices (%)",
        caption="Pairs of token and expert that were chosen but not kept, share of all valid pairs",
        lacking="no run has a drop rate in its metrics",
        percent=True,
        headline=_who_drops,
    )


def _who_drops(variants: Sequence[VariantCurves]) -> str | None:
    ends = [(float(smooth(v.line).y[-1]), v.name) for v in variants]
    (least, thrifty), (most, lavish) = min(ends), max(ends)
    if most - least <= 0.02:
        return None
    return f"{lavish} ends dropping {percent(most)} of choices, {thrifty} {percent(least)}"


def _without_expert(results: Results) -> Plot | Missing:
    return plot_curve(
        results,
        train_curve("tokens_without_expert"),
        label="tokens without an expert (%)",
        caption="Tokens that no expert kept, which pass a layer by their residual alone; share of"
        " all tokens, over all MoE layers",
        lacking="no run counts tokens without an expert in its metrics",
        percent=True,
    )


def _kept_mass(results: Results) -> Plot | Missing:
    return plot_curve(
        results,
        layer_curve("kept_affinity_mass"),
        label="kept affinity mass (%)",
        caption="Gate weight of kept choices over that of all choices, mean over MoE layers: above"
        " the kept share where experts keep the tokens they suit",
        lacking="no run has the kept affinity mass in its metrics",
        percent=True,
        from_zero=False,
    )


DROP_RATE = Spec("drop-rate", "Dropped choices over training", "Dropping", _drop_rate)
WITHOUT_EXPERT = Spec(
    "tokens-without-expert", "Tokens that no expert kept", "Dropping", _without_expert
)
KEPT_MASS = Spec("kept-affinity-mass", "Affinity mass that experts kept", "Dropping", _kept_mass)
