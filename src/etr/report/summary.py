"""Rows to figures of merit: mean and range over seeds, and paired differences to the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from etr.report.results import VALUES, Results, ResultsLike, Row, load_results
from etr.report.statistics import mean, t_interval
from etr.report.wording import listed

Verdict = Literal["lower", "higher", "within noise"]

# Served and trained kept shares further apart than this mean that the thresholds are off.
KEPT_GAP_ALARM = 0.02


@dataclass(frozen=True, kw_only=True)
class SeedEstimate:
    """One number of one variant over its seeds."""

    mean: float
    """Mean over the seeds that have the number."""
    low: float
    """Least over seeds."""
    high: float
    """Most over seeds."""
    count: int
    """Seeds that have the number."""
    missing: int
    """Seeds that lack it, for instance because the run diverged."""

    @property
    def half_range(self) -> float:
        """Half of most minus least; 0 for one seed."""
        return (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Variant minus baseline of one number, paired by seed."""

    mean: float
    """Mean of the differences."""
    low: float
    """Least over seeds."""
    high: float
    """Most over seeds."""
    interval: tuple[float, float] | None
    """95 % t-interval of the mean; None with one shared seed."""
    count: int
    """Seeds that both have."""
    missing: int
    """Seeds of either that cannot be paired; a claim would rest on the survivors."""
    comparable: bool
    """False where the two differ in `causal`, or one's losses alone are bounds."""
    baseline: float
    """Mean of the baseline over the paired seeds, for relative differences."""

    @property
    def verdict(self) -> Verdict:
        """`within noise` unless the interval excludes 0 and no seed is missing."""
        if self.interval is None or self.missing or not self.comparable:
            return "within noise"
        if self.interval[0] > 0:
            return "higher"
        return "lower" if self.interval[1] < 0 else "within noise"

    @property
    def reason(self) -> str:
        """The verdict in words, with what stands in the way of one."""
        if not self.comparable:
            return "not comparable"
        if self.missing:
            return "undecided: seeds missing"
        if self.interval is None:
            return "undecided: one seed"
        return self.verdict


@dataclass(frozen=True, kw_only=True)
class VariantSummary:
    """One variant over its seeds."""

    name: str
    """The variant."""
    router: str
    """Name of the router."""
    capacity: str
    """Capacity policy, in words."""
    selection: str
    """How experts kept tokens for `val_loss`: `threshold` or `dropless`."""
    causal: bool | None
    """False where later tokens may change earlier ones; None where the runs do not say."""
    bound: bool
    """Whether losses are upper bounds of the text's nats."""
    seeds: tuple[int, ...]
    """Seeds, ascending."""
    estimates: Mapping[str, SeedEstimate]
    """Estimates by name of the number; a number that no seed has is absent."""
    differences: Mapping[str, Difference]
    """Differences by name of the number; empty for the baseline or where nothing can be paired."""

    @property
    def kept_gap(self) -> float | None:
        """Kept share when served minus kept share in training; None unless thresholds serve."""
        served, trained = (
            self.estimates.get(key) for key in ("kept_fraction_eval", "kept_fraction")
        )
        if self.selection != "threshold" or served is None or trained is None:
            return None
        return served.mean - trained.mean

    @property
    def kept_gap_alarms(self) -> bool:
        """True where the gap is over two points, so that the threshold loss is not the method's."""
        return self.kept_gap is not None and abs(self.kept_gap) > KEPT_GAP_ALARM


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All variants, the baseline first."""

    variants: tuple[VariantSummary, ...]
    """Summaries in the order of the results; never empty."""

    @property
    def baseline(self) -> VariantSummary:
        """The variant that all others are compared with."""
        return self.variants[0]

    @property
    def challengers(self) -> tuple[VariantSummary, ...]:
        """All variants but the baseline."""
        return self.variants[1:]

    @property
    def incomparable(self) -> tuple[str, ...]:
        """Names of the variants that differ from the baseline in `causal` or `bound`."""
        unlike = {*self.unlike("causal"), *self.unlike("bound")}
        return tuple(v.name for v in self.challengers if v.name in unlike)

    def unlike(self, field: str) -> tuple[str, ...]:
        """Names of the variants that differ from the baseline in a field."""
        ours = getattr(self.baseline, field)
        return tuple(v.name for v in self.challengers if getattr(v, field) is not ours)

    @property
    def bounds(self) -> tuple[str, ...]:
        """Names of the variants whose losses are upper bounds."""
        return tuple(v.name for v in self.variants if v.bound)


def summarize(results: ResultsLike) -> Summary:
    """Aggregate the rows by variant over seeds.

    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    results = load_results(results)
    baseline = results.of(results.names[0])
    return Summary(
        variants=tuple(
            _summarize_variant(
                results.of(name), baseline, results.is_comparison and name != results.names[0]
            )
            for name in results.names
        )
    )


def _summarize_variant(
    rows: Sequence[Row], baseline: Sequence[Row], compare: bool
) -> VariantSummary:
    first = rows[0]
    estimates = {key: estimate(rows, key) for key in VALUES}
    differences = {key: difference(rows, baseline, key) for key in VALUES} if compare else {}
    return VariantSummary(
        name=first.name,
        router=first.router,
        capacity=first.capacity,
        selection=first.selection,
        causal=first.causal,
        bound=first.bound,
        seeds=tuple(sorted(row.seed for row in rows)),
        estimates={key: value for key, value in estimates.items() if value is not None},
        differences={key: value for key, value in differences.items() if value is not None},
    )


def estimate(rows: Sequence[Row], key: str) -> SeedEstimate | None:
    """Mean and range of one number over a variant's rows; None where no row has it."""
    values = [value for row in rows if (value := row.values[key]) is not None]
    if not values:
        return None
    return SeedEstimate(
        mean=mean(values),
        low=min(values),
        high=max(values),
        count=len(values),
        missing=len(rows) - len(values),
    )


def difference(rows: Sequence[Row], baseline: Sequence[Row], key: str) -> Difference | None:
    """Paired difference of one number by seed; None where no seed has both values."""
    ours = {row.seed: row.values[key] for row in rows}
    theirs = {row.seed: row.values[key] for row in baseline}
    pairs = [
        (our, their)
        for seed in sorted(ours.keys() & theirs.keys())
        if (our := ours[seed]) is not None and (their := theirs[seed]) is not None
    ]
    if not pairs:
        return None
    deltas = [our - their for our, their in pairs]
    return Difference(
        mean=mean(deltas),
        low=min(deltas),
        high=max(deltas),
        interval=t_interval(deltas),
        count=len(pairs),
        missing=len(ours.keys() | theirs.keys()) - len(pairs),
        comparable=(rows[0].causal, rows[0].bound) == (baseline[0].causal, baseline[0].bound),
        baseline=mean([their for _, their in pairs]),
    )


def loss_note(results: Results) -> str:
    """Sentences for captions: whose losses are bounds, and whose do not compare.

    A space stands before each; empty where no loss is a bound and all compare.
    """
    summary = summarize(results)
    found = f" {bounds_note(summary)}" if summary.bounds else ""
    for what, field in (("causality", "causal"), ("what the loss is", "bound")):
        if results.is_comparison and (names := summary.unlike(field)):
            first = results.names[0]
            found += f" Not to be compared with {first} ({what} differs): {listed(names)}."
    return found


def bounds_note(summary: Summary) -> str:
    """A sentence that names whose losses are bounds."""
    return f"The loss of {listed(summary.bounds)} is an upper bound of the text's nats."
