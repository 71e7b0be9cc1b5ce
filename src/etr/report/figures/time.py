"""Where a step's time goes: over training, by kind of work, and by operator."""

import statistics
from collections.abc import Mapping, Sequence

from etr.report.curves import train_curve
from etr.report.dots import dot_chart, part_chart
from etr.report.found import MOST_RUNS as MOST_BARS
from etr.report.found import Found, every_run, first_of_each, too_many
from etr.report.lines import not_shown, plot_curve
from etr.report.observations import SPANS
from etr.report.results import Results, Row
from etr.report.spec import Missing, Numbers, Plot, Spec
from etr.report.style import SERIES
from etr.report.wording import counted, percent, significant

MOST_OPERATORS = 10
_NO_PROFILE = "no run has a profile in its metrics"


def _step_time(results: Results) -> Plot | Missing:
    return plot_curve(
        results,
        train_curve("step_time_seconds", scale=1e3),
        label="step time (ms)",
        caption="Wall time of each training step, data loading to optimizer",
        lacking="no run has a step time in its metrics",
    )


# Parts of a step that do not overlap, from the spans that do: name, colour.
_PARTS = {
    "computation alone": SERIES[1],
    "computation with communication": SERIES[3],
    "communication alone": SERIES[2],
    "idle": SERIES[0],
}


def _spans(row: Row) -> Mapping[str, float] | None:
    """Mean over the profiled passes of each span, seconds; None without any."""
    profiles = [p.seconds for p in (row.metrics.profiles if row.metrics else ()) if p.seconds]
    if not profiles:
        return None
    return {span: statistics.fmean(p.get(span, 0.0) for p in profiles) for span in SPANS}


def _parts(spans: Mapping[str, float]) -> list[float]:
    both = spans["overlapped"]
    parts = (spans["computation"] - both, both, spans["communication"] - both, spans["idle"])
    return [1e3 * max(part, 0.0) for part in parts]


def _step_time_split(results: Results) -> Plot | Missing:
    found = every_run(results, _spans)
    if not found:
        return Missing(_NO_PROFILE)
    shown = found[:MOST_BARS]
    bars = [(run.name, run.row.name, _parts(run.value)) for run in shown]
    return Plot(
        chart=part_chart(bars, _PARTS, "time of a forward and backward pass (ms)", ",.4~f"),
        caption="A forward and backward pass by what the device does: mean over each run's profiled"
        " passes. Communication that runs during computation is drawn once; idle is the rest."
        f"{too_many(found)}{not_shown(results, [run.row.name for run in found])}",
        numbers=Numbers(
            columns=("run", "seed", *(f"{span} (s)" for span in SPANS)),
            rows=[
                (run.row.name, run.row.seed, *(run.value[span] for span in SPANS)) for run in found
            ],
        ),
        title=_split_title(shown),
    )


def _split_title(runs: Sequence[Found[Mapping[str, float]]]) -> str | None:
    """What a single run spends its time on, where one part is over half of it."""
    if len(runs) != 1:
        return None
    parts = _parts(runs[0].value)
    most, name = max(zip(parts, _PARTS, strict=True))
    return (
        f"{percent(most / sum(parts), 0)} of a forward and backward pass is {name}"
        if most > 0.5 * sum(parts)
        else None
    )


def _operators(row: Row) -> dict[str, tuple[float, int]] | None:
    """Seconds and calls per profiled pass of each operator; None without any."""
    profiles = [p for p in (row.metrics.profiles if row.metrics else ()) if p.operators]
    totals: dict[str, tuple[float, int]] = {}
    for profile in profiles:
        for operator in profile.operators:
            seconds, calls = totals.get(operator.name, (0.0, 0))
            totals[operator.name] = (seconds + operator.seconds, calls + operator.calls)
    return {n: (s / len(profiles), c // len(profiles)) for n, (s, c) in totals.items()} or None


def _operator_time(results: Results) -> Plot | Missing:
    found = first_of_each(results, _operators)
    if not found:
        return Missing("no run has operator times in its metrics")
    totals: dict[str, float] = {}
    for run in found:
        for name, (seconds, _) in run.value.items():
            totals[name] = max(totals.get(name, 0.0), seconds)
    longest = sorted(totals, key=lambda name: -totals[name])[:MOST_OPERATORS]
    dots = [
        (name, run.name, milliseconds, 0.0, milliseconds)
        for run in found
        for name in longest
        if name in run.value
        for milliseconds in (1e3 * run.value[name][0],)
    ]
    label = "time in the operator per pass (ms)"
    slowest = longest[0]
    return Plot(
        chart=dot_chart(results, dots, longest, label, zero=True, letters=27),
        caption=f"The {counted(len(longest), 'operator')} that take longest in any run, without"
        " what they call: mean over the profiled passes of each variant's first seed."
        f" Longest: {slowest}, {significant(1e3 * totals[slowest])} ms."
        f"{not_shown(results, found)}",
        numbers=Numbers(
            columns=("run", "seed", "operator", "time per pass (s)", "calls per pass"),
            rows=[
                (run.name, run.row.seed, name, seconds, calls)
                for run in found
                for name, (seconds, calls) in run.value.items()
            ],
        ),
    )


STEP_TIME = Spec("step-time", "Step time over training", "Time and memory", _step_time)
SPLIT = Spec(
    "step-time-split", "Computation, communication, idle time", "Time and memory", _step_time_split
)
OPERATORS = Spec("operator-time", "Time by operator", "Time and memory", _operator_time)
