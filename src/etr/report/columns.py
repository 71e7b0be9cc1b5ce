"""The comparison table, once: what each column says of a variant, for every way to print it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from etr.report.summary import (
    Difference,
    SeedEstimate,
    Summary,
    VariantSummary,
    Verdict,
    bounds_note,
)
from etr.report.wording import (
    ABSENT,
    AT_MOST,
    NBSP,
    between,
    fixed,
    percent,
    short,
    signed,
    significant,
)

Tone = Literal["plain", "good", "bad", "quiet", "alarm"]
LOSS_DIGITS = 4
_TONES: dict[Verdict, Tone] = {"lower": "good", "higher": "bad", "within noise": "quiet"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell: a main text and, smaller, what qualifies it."""

    text: str
    """The number or name."""
    detail: str = ""
    """Spread, change or verdict; may be empty."""
    tone: Tone = "plain"
    """`good` and `bad` only where an interval excludes 0."""
    value: float | None = None
    """What rows are sorted by; None for the text."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table."""

    header: str
    """Name of the column."""
    cell: Callable[[VariantSummary], Cell]
    """What it says of a variant."""
    unit: str = ""
    """Unit of its numbers."""
    brief: str = ""
    """Header where room is scarce, with line breaks; `header` if empty."""
    numeric: bool = True
    """Whether it is set right-aligned."""


def loss_cell(variant: VariantSummary, key: str = "val_loss") -> Cell:
    """A loss: mean over seeds and half its range."""
    value = variant.estimates.get(key)
    if value is None:
        return Cell(text=ABSENT, detail="no value")
    spread = f"±{fixed(value.half_range, LOSS_DIGITS)}" if value.count > 1 else "one seed"
    return Cell(
        text=f"{AT_MOST if variant.bound else ''}{fixed(value.mean, LOSS_DIGITS)}",
        detail=missing_seeds(value) or spread,
        value=value.mean,
    )


def difference_cell(variant: VariantSummary, key: str = "val_loss") -> Cell:
    """A loss minus the baseline's, paired by seed: mean, 95 % interval and verdict."""
    found = variant.differences.get(key)
    if found is None:
        return Cell(text=ABSENT, detail="no pair" if variant.differences else "baseline")
    if not found.comparable:
        return Cell(text=ABSENT, detail=found.reason, tone="quiet")
    text = signed(found.mean, LOSS_DIGITS)
    if found.interval is not None:
        text += f" ±{fixed(found.interval[1] - found.mean, LOSS_DIGITS)}"
    return Cell(text=text, detail=found.reason, tone=_TONES[found.verdict], value=found.mean)


def difference_range_cell(variant: VariantSummary, key: str = "val_loss") -> Cell:
    """Least and most of a loss minus the baseline's over the paired seeds."""
    found = variant.differences.get(key)
    if found is None or not found.comparable:
        return Cell(text=ABSENT)
    return Cell(text=between(found.low, found.high, LOSS_DIGITS))


def missing_seeds(value: SeedEstimate) -> str:
    """`2 of 3 seeds` where a seed lacks the number, else nothing."""
    return f"{value.count} of {value.count + value.missing} seeds" if value.missing else ""


def kept_eval_cell(variant: VariantSummary) -> Cell:
    """Share kept when served; where thresholds serve, with its gap to training in points."""
    value, gap = variant.estimates.get("kept_fraction_eval"), variant.kept_gap
    return Cell(
        text=percent(value.mean if value else None),
        detail="" if gap is None else f"{signed(100 * gap, 1)}{NBSP}pt",
        tone="alarm" if variant.kept_gap_alarms else "plain",
        value=value.mean if value else None,
    )


def relative_change(found: Difference | None) -> str:
    """Difference in percent of the baseline; empty where that has no meaning."""
    if found is None or not found.comparable or not found.baseline:
        return ""
    return f"{signed(100 * found.mean / abs(found.baseline), 1)}{NBSP}%"


def number_cell(
    key: str, write: Callable[[float | None], str], *, scale: float = 1.0, relative: bool = False
) -> Callable[[VariantSummary], Cell]:
    """Mean over seeds times `scale`; with `relative`, the change to the baseline below it."""

    def cell(variant: VariantSummary) -> Cell:
        value = variant.estimates.get(key)
        return Cell(
            text=write(value.mean * scale if value else None),
            detail=relative_change(variant.differences.get(key)) if relative else "",
            value=value.mean if value else None,
        )

    return cell


def step_time_cell(variant: VariantSummary) -> Cell:
    """Median step time; below it the median ratio to the baseline within a round of steps.

    Variants that train in turn give such ratios; otherwise the medians are compared, which a
    drift of the machine's speed can mislead.
    """
    seconds = variant.estimates.get("step_time_seconds_median")
    within_rounds = variant.differences.get("step_time_ratio_median")
    medians = variant.differences.get("step_time_seconds_median")
    return Cell(
        text=significant(seconds.mean * 1e3 if seconds else None),
        detail=relative_change(within_rounds or medians),
        value=seconds.mean if seconds else None,
    )


def _parameters(variant: VariantSummary) -> Cell:
    total, active = (variant.estimates.get(k) for k in ("parameters", "active_parameters"))
    return Cell(
        text=short(total.mean if total else None),
        detail=short(active.mean) if active else "",
        value=total.mean if total else None,
    )


COLUMNS = (
    Column(header="variant", numeric=False, cell=lambda v: Cell(text=v.name)),
    Column(header="router", numeric=False, cell=lambda v: Cell(text=v.router)),
    Column(header="capacity", numeric=False, cell=lambda v: Cell(text=v.capacity)),
    Column(header="val loss", unit="nats/token", brief="val loss\nnats/tok", cell=loss_cell),
    Column(
        header="Δ baseline", unit="nats/token", brief="Δ baseline\nnats/tok", cell=difference_cell
    ),
    Column(
        header="kept train",
        unit="of choices",
        brief="kept\ntrain",
        cell=number_cell("kept_fraction", percent),
    ),
    Column(header="kept eval", unit="of choices", brief="kept\neval", cell=kept_eval_cell),
    Column(
        header="MaxVio",
        unit="0 = even",
        brief="MaxVio",
        cell=number_cell("max_violation", lambda value: fixed(value, 2)),
    ),
    Column(
        header="step time",
        unit="ms",
        brief="step\nms",
        cell=step_time_cell,
    ),
    Column(
        header="experts",
        unit="GFLOP/step",
        brief="experts\nGFLOP/\nstep",
        cell=number_cell("expert_flops_per_step", significant, scale=1e-9, relative=True),
    ),
    Column(header="parameters", unit="all, active", brief="param.\nactive", cell=_parameters),
)


_FIRST = ("variant", "Δ baseline", "val loss")
_LAST = ("router", "capacity")
PAGE_COLUMNS = (
    *(column for name in _FIRST for column in COLUMNS if column.header == name),
    *(column for column in COLUMNS if column.header not in (*_FIRST, *_LAST)),
    *(column for column in COLUMNS if column.header in _LAST),
)
"""The columns of the page: what is decided comes first, what it was made of last."""
RUN_COLUMNS = (
    Column(header="run", numeric=False, cell=lambda v: Cell(text=v.name)),
    *(column for column in COLUMNS[1:] if column.header not in ("Δ baseline", "parameters")),
    Column(
        header="steps",
        unit="logged",
        cell=number_cell("steps", lambda value: fixed(value, 0)),
    ),
)
"""The columns of runs that are not compared."""


def footnotes(summary: Summary, columns: Sequence[Column] = COLUMNS) -> tuple[str, ...]:
    """How the numbers of the table's columns are computed, one sentence each."""
    shown = {column.header for column in columns}
    marked = f" {AT_MOST}: {bounds_note(summary)}" if summary.bounds else ""
    notes = (
        (
            "val loss",
            "val loss: mean over seeds ± half the range, with each variant's experts selected as it"
            f" is served (threshold or dropless).{marked}",
        ),
        (
            "Δ baseline",
            f"Δ: difference to {summary.baseline.name} paired by seed, mean ± half of its 95 %"
            " t-interval; within noise unless that interval excludes 0. Intervals are not corrected"
            " for the number of comparisons.",
        ),
        (
            "kept train",
            "kept: choices that an expert kept, in the last 100 training steps and when served; the"
            " gap between them is in percentage points. Experts that choose tokens themselves are"
            " counted against what they have room for.",
        ),
        (
            "MaxVio",
            "MaxVio: most loaded expert over mean load, minus 1, before dropping. Step time is the"
            " median; its change is the median ratio to the baseline's step of the same round,"
            " where the variants train in turn. Expert compute counts kept tokens only, forward and"
            " backward.",
        ),
    )
    return tuple(note for header, note in notes if header in shown)
