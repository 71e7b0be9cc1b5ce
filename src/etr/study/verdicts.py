"""The papers' claims, each against a measurement of this study."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from etr.study.collection import Collection
from etr.study.summary import LossDifference, difference

NO_WORSE = 0.02
"""Nats by which a loss may be higher, at the interval's upper end, to be called no worse."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim and what came of it."""

    claim: str
    """Claim of arXiv 2406.00023 or 2401.13920."""
    measurement: str
    """What stands against it here."""
    verdict: str
    """Holds, does not hold, or cannot be said at this size."""
    why: str
    """Reason, in a sentence."""


HOLDS, FAILS, UNKNOWN = "holds here", "does not hold here", "cannot be said at this size"


def verdicts(study: Collection) -> list[Verdict]:
    """Every claim that this study can speak to; those without their runs are left out."""
    makers: tuple[Callable[[Collection], Verdict | None], ...] = (
        _fewer_tokens,
        _fewer_tokens_lm,
        _against_one_direction,
        _clusters,
        _quality,
        _schedule,
        _time_baseline,
        _time_locmoe,
        _balance,
        _correlation,
    )
    return [verdict for make in makers if (verdict := make(study)) is not None]


def _compare(study: Collection, task: str, row: str, other: str) -> LossDifference | None:
    own, reference = study.row(task, row), study.row(task, other)
    return difference(own, reference) if own and reference else None


def _no_worse(found: LossDifference, why_not: str, why: str) -> tuple[str, str]:
    if found.interval is None:
        return UNKNOWN, "One seed gives no interval."
    if found.interval[0] > 0:
        return FAILS, why_not
    if found.interval[1] < NO_WORSE:
        return HOLDS, why
    return UNKNOWN, f"The interval reaches beyond {NO_WORSE} nats."


def _fewer_tokens(study: Collection) -> Verdict | None:
    found = _compare(study, "text-x", "fixed-0.6", "fixed-1.1")
    if found is None:
        return None
    verdict, why = _no_worse(
        found,
        "Where the experts limit the loss, tokens without an expert cost.",
        "The interval ends below the bound.",
    )
    return Verdict(
        claim="40 % fewer tokens per expert at the same quality",
        measurement=f"`text-x`, fixed frame, factor 0.6 less factor 1.1, equal steps: {found}",
        verdict=verdict,
        why=why,
    )


def _fewer_tokens_lm(study: Collection) -> Verdict | None:
    found = _compare(study, "lm", "etr_paper", "linear-1.1")
    if found is None:
        return None
    verdict, why = _no_worse(
        found,
        "The smaller capacity at the end costs here too.",
        "A model that is not limited by its experts hardly feels the smaller capacity.",
    )
    return Verdict(
        claim="40 % fewer tokens per expert at the same quality, in a language model",
        measurement=f"`lm`, etr_paper less linear-1.1, equal steps: {found}",
        verdict=verdict,
        why=why,
    )


def _against_one_direction(study: Collection) -> Verdict | None:
    tokens = _compare(study, "text-x", "fixed-0.6", "tokens-choose-0.6")
    experts = _compare(study, "text-x", "fixed-0.6", "experts-choose-0.6")
    if tokens is None or experts is None:
        return None
    better = tokens.verdict == experts.verdict == "lower"
    worse = "higher" in (tokens.verdict, experts.verdict)
    return Verdict(
        claim="both directions together beat token choice alone and expert choice alone",
        measurement=f"`text-x`, factor 0.6, both less tokens alone: {tokens}; less experts alone: "
        f"{experts}",
        verdict=HOLDS if better else FAILS if worse else UNKNOWN,
        why="As served: both by thresholds, tokens alone dropless (it drops by position, for which "
        "no causal threshold exists and which spends more compute when served), experts alone by "
        "thresholds.",
    )


def _clusters(study: Collection) -> Verdict | None:
    names = {"both": "fixed-0.6", "tokens": "tokens-choose-0.6", "experts": "experts-choose-0.6"}
    values = {}
    for kind, name in names.items():
        row = study.row("text-x", name)
        kept = row.measured("calinski_harabasz_kept") if row else None
        trimmed = row.measured("calinski_harabasz_trimmed") if row else None
        whole = row.measured("calinski_harabasz_all") if row else None
        if kept is None or trimmed is None or whole is None:
            return None
        values[kind] = (kept, whole, trimmed)
    highest = max(values, key=lambda kind: values[kind][0]) == "both"
    above = values["both"][0] > values["both"][2]
    text = "; ".join(f"{kind} {k:.3f} ({a:.3f})" for kind, (k, a, _) in values.items())
    return Verdict(
        claim="the Calinski-Harabasz ratio is highest with both directions",
        measurement=f"`text-x`, factor 0.6, kept tokens (all tokens): {text}; both, by trimming "
        f"alone: {values['both'][2]:.3f}",
        verdict=HOLDS if highest and above else FAILS,
        why="It is what keeping each expert's extreme tokens does to any partition: the control "
        "reaches as much."
        if highest and not above
        else "Kept tokens are compared at the same number in every row.",
    )


def _quality(study: Collection) -> Verdict | None:
    found = _compare(study, "text-x", "etr_paper", "baseline")
    language = _compare(study, "lm", "etr_paper", "baseline")
    if found is None:
        return None
    text = f"`text-x`, etr_paper less baseline, equal steps: {found}"
    if language is not None:
        text += f"; `lm`: {language}"
    return Verdict(
        claim="better answers than the baseline after the same training (GDAD, TeleQnA, HumanEval)",
        measurement=text,
        verdict={"lower": HOLDS, "higher": FAILS}.get(found.verdict, UNKNOWN),
        why="Held-out loss stands for the papers' question sets, which need far larger models.",
    )


def _schedule(study: Collection) -> Verdict | None:
    found = _compare(study, "text-x", "etr_paper", "fixed-0.6")
    linear = _compare(study, "text-x", "linear-schedule", "linear-0.6")
    if found is None or linear is None:
        return None
    return Verdict(
        claim="moving from token choice to expert choice over training helps",
        measurement=f"`text-x`, schedule less constant 0.6: {found} (linear router: {linear})",
        verdict={"lower": HOLDS, "higher": FAILS}.get(found.verdict, UNKNOWN),
        why="The schedule also spends more expert compute than the constant it ends in; see the "
        "rows at equal expert FLOPs.",
    )


def _time(study: Collection, other: str, claim: str, least: float) -> Verdict | None:
    for task in ("lm", "text-x"):
        own, against = study.seconds(task, "etr_paper"), study.seconds(task, other)
        if own is None or against is None:
            continue
        saved = 1 - own / against
        return Verdict(
            claim=claim,
            measurement=f"`{task}`, one process, mean step over the schedule: {saved:+.1%} saved",
            verdict=HOLDS if saved >= least else FAILS,
            why="One process has no All-to-All; what is saved is expert compute alone.",
        )
    return None


def _time_baseline(study: Collection) -> Verdict | None:
    claim = "5.4 to 46.6 % less training time than the baseline"
    return _time(study, "baseline", claim, 0.054)


def _time_locmoe(study: Collection) -> Verdict | None:
    return _time(study, "locmoe", "2.9 to 13.3 % less training time than LocMoE", 0.029)


def _balance(study: Collection) -> Verdict | None:
    rows = [study.row("text-x", name) for name in ("fixed-0.6", "fixed-no-aux-0.6")]
    if rows[0] is None or rows[1] is None:
        return None
    with_loss, without = (row.average("max_violation_last") for row in rows if row)
    return Verdict(
        claim="the auxiliary loss leaves the load skewed; with the locality loss it is balanced",
        measurement=f"`text-x`, fixed frame, MaxVio {with_loss:.2f} with the balance loss, "
        f"{without:.2f} without",
        verdict=UNKNOWN,
        why="The locality loss needs several nodes; the balance loss alone is measured here.",
    )


def _correlation(study: Collection) -> Verdict | None:
    row = study.row("text-x", "fixed-0.6")
    same = row.measured("correlation_same_expert") if row else None
    other = row.measured("correlation_other_expert") if row else None
    if same is None or other is None:
        return None
    return Verdict(
        claim="after training, features of tokens correlate above 0.8 in blocks",
        measurement=f"`text-x`, fixed frame, mean correlation of tokens of the same expert "
        f"{same:.2f}, of different experts {other:.2f}",
        verdict=HOLDS if same > 0.8 else FAILS,
        why="Blocks are there if the first is well above the second; 0.8 is the papers' figure.",
    )
