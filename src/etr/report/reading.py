"""Sentences about a comparison, each computed from its numbers; none is written by hand."""

import math
from dataclasses import dataclass

from etr.report.columns import LOSS_DIGITS
from etr.report.results import Results, ResultsLike, load_results
from etr.report.summary import Difference, Summary, VariantSummary, bounds_note, summarize
from etr.report.wording import between, counted, fixed, listed, signed

NOTHING = "Nothing that more than one seed shows beyond noise."
"""What stands where no difference is decided."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number of which less is better."""

    key: str
    """Field of the row."""
    label: str
    """What a reader calls it."""
    unit: str = ""
    """Unit of its differences; may be empty."""
    digits: int = LOSS_DIGITS
    """Decimals of its differences."""
    relative: bool = False
    """Whether differences are said in percent of the baseline."""
    counted: bool = False
    """Whether it is counted, not measured: seeds that all agree in its sign decide it."""


QUANTITIES = (
    Quantity(key="val_loss", label="held-out loss", unit=" nats/token"),
    Quantity(
        key="val_loss_dropless", label="held-out loss with nothing dropped", unit=" nats/token"
    ),
    Quantity(
        key="expert_flops_per_step", label="expert compute per step", relative=True, counted=True
    ),
    Quantity(key="step_time_ratio_median", label="step time", relative=True),
    Quantity(key="max_violation", label="load violation (MaxVio)", digits=2),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one variant does better, worse, or undecidedly than the baseline."""

    name: str
    """The variant."""
    parts: tuple[str, ...]
    """One clause per quantity."""

    def __str__(self) -> str:
        return f"{self.name}: {'; '.join(self.parts)}."


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The comparison in words."""

    gains: tuple[Finding, ...]
    """Where an interval lies wholly on the better side of 0."""
    losses: tuple[Finding, ...]
    """Where it lies wholly on the worse side."""
    undecided: tuple[Finding, ...]
    """What lies within noise."""
    caveats: tuple[str, ...]
    """What a reader must know before believing any of it."""


def read(results: ResultsLike) -> Reading:
    """Say what the variants gain and lose against the baseline, and what stands against it.

    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    results = load_results(results)
    summary = summarize(results)
    return Reading(
        gains=_findings(summary, "lower"),
        losses=_findings(summary, "higher"),
        undecided=_findings(summary, "within noise"),
        caveats=_caveats(results, summary),
    )


def _findings(summary: Summary, verdict: str) -> tuple[Finding, ...]:
    found = []
    for variant in summary.challengers:
        parts = tuple(
            _clause(quantity, variant.differences[quantity.key])
            for quantity in QUANTITIES
            if _speaks(summary, variant, quantity, verdict)
        )
        if parts:
            found.append(Finding(name=variant.name, parts=parts))
    return tuple(found)


def _speaks(summary: Summary, variant: VariantSummary, quantity: Quantity, verdict: str) -> bool:
    difference = variant.differences.get(quantity.key)
    if difference is None or not difference.comparable:
        return False
    if quantity.key == "val_loss_dropless" and (
        summary.baseline.selection == variant.selection == "dropless"
    ):
        return False  # the same number twice
    if not quantity.key.startswith("val_loss") and difference.low == difference.high == 0:
        return False  # a cost that is the same is no news
    return _verdict(quantity, difference) == verdict


def _verdict(quantity: Quantity, difference: Difference) -> str:
    if quantity.counted and not difference.missing and difference.low * difference.high > 0:
        return "lower" if difference.mean < 0 else "higher"
    return difference.verdict


def _clause(quantity: Quantity, difference: Difference) -> str:
    if quantity.relative and difference.baseline:
        scale, digits, unit = 100 / abs(difference.baseline), 1, " %"
    else:
        scale, digits, unit = 1.0, quantity.digits, quantity.unit
    low, high = difference.interval or (difference.low, difference.high)
    text = f"{quantity.label} {signed(scale * difference.mean, digits)}{unit}"
    if quantity.counted and difference.verdict != _verdict(quantity, difference):
        if difference.count == 1:
            return f"{text} (counted, one seed)"
        seeds = counted(difference.count, "seed")
        span = between(scale * difference.low, scale * difference.high, digits)
        return f"{text} (counted: {span} over {seeds})"
    if difference.interval is None or difference.missing:
        return f"{text} ({difference.reason.removeprefix('undecided: ')})"
    if math.isclose(low, high):  # a mean over seeds rounds
        return f"{text} (the same in every seed)"
    return f"{text} (95 % interval {between(scale * low, scale * high, digits)})"


def _caveats(results: Results, summary: Summary) -> tuple[str, ...]:
    compared = [*_seed_caveats(summary), *_comparability_caveats(summary), *_gap_caveats(summary)]
    found = compared if results.is_comparison else []
    return (*found, *_budget_caveats(summary), *_length_caveats(results), *results.notes)


def _seed_caveats(summary: Summary) -> list[str]:
    found = []
    fewest = min(len(variant.seeds) for variant in summary.variants)
    if fewest == 1 and summary.challengers:
        found.append("A variant with one seed has no interval: its differences decide nothing.")
    for variant in summary.variants:
        loss = variant.estimates.get("val_loss")
        if loss is None:
            found.append(f"{variant.name} has no held-out loss in any seed.")
        elif loss.missing:
            found.append(
                f"{variant.name} has no held-out loss in {counted(loss.missing, 'seed')}: its mean"
                " is over the survivors, so no verdict is given."
            )
    return found


def _comparability_caveats(summary: Summary) -> list[str]:
    found = []
    if summary.bounds:
        found.append(bounds_note(summary))
    if others := summary.unlike("bound"):
        names = f"{listed(others)} and {summary.baseline.name}"
        found.append(f"{names} differ in that: no difference is given.")
    if others := summary.unlike("causal"):
        verb = "is" if len(others) == 1 else "are"
        contrast = (
            "not causal (later tokens change earlier ones) while the baseline is"
            if summary.baseline.causal
            else "causal while the baseline is not (later tokens change earlier ones)"
        )
        found.append(f"{listed(others)} {verb} {contrast}: no difference is given.")
    selections = {
        selection: [v.name for v in summary.variants if v.selection == selection]
        for selection in ("threshold", "dropless")
    }
    if all(selections.values()):
        found.append(
            "Each variant's held-out loss is the one it would be served with: by threshold for"
            f" {listed(selections['threshold'])}; with nothing dropped for"
            f" {listed(selections['dropless'])}."
        )
    return found


def _gap_caveats(summary: Summary) -> list[str]:
    return [
        f"{variant.name} keeps {fixed(100 * abs(variant.kept_gap), 1)} points"
        f" {'more' if variant.kept_gap > 0 else 'less'} of its choices when served than in"
        " training, over the two that are allowed: its threshold loss is not that of the"
        " trained selection."
        for variant in summary.variants
        if variant.kept_gap is not None and variant.kept_gap_alarms
    ]


def _budget_caveats(summary: Summary) -> list[str]:
    found = []
    for key, noun in (("steps", "steps"), ("tokens", "tokens"), ("parameters", "parameters")):
        groups: dict[str, list[str]] = {}
        for variant in summary.variants:
            if value := variant.estimates.get(key):
                low, high = fixed(value.low, 0), fixed(value.high, 0)
                span = low if low == high else f"{low} to {high}"
                groups.setdefault(span, []).append(variant.name)
        if len(groups) > 1:
            spans = "; ".join(f"{listed(names)}: {span}" for span, names in groups.items())
            found.append(f"The variants differ in {noun} ({spans}).")
    return found


def _length_caveats(results: Results) -> list[str]:
    found = []
    for name in results.names:
        curves = [row.metrics.step for row in results.of(name) if row.metrics]
        ends = sorted({int(steps[-1]) for steps in curves if steps.size})
        if len(ends) > 1:
            found.append(
                f"The seeds of {name} end at different steps ({ends[0]:,} to {ends[-1]:,}): a mean"
                " curve covers the steps that all of them have."
            )
    return found


def headline(summary: Summary) -> str | None:
    """The clearest finding on held-out loss, or None where no single sentence is fair."""
    rated = [
        (difference, variant.name)
        for variant in summary.challengers
        if (difference := variant.differences.get("val_loss")) and difference.comparable
    ]
    baseline = summary.baseline.name
    bound = " (of an upper bound)" if summary.baseline.bound else ""
    lower = [pair for pair in rated if pair[0].verdict == "lower"]
    if lower:
        difference, name = min(lower, key=lambda pair: pair[0].mean)
        return f"{name} ends {fixed(-difference.mean, 3)} nats/token{bound} below {baseline}"
    if rated and all(difference.verdict == "higher" for difference, _ in rated):
        difference, name = min(rated, key=lambda pair: pair[0].mean)
        above = f"{name} ends {fixed(difference.mean, 3)} above it"
        return f"No variant reaches {baseline}: {above}{bound}"
    return None
