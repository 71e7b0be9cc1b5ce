"""What training warned of, in plain words: one entry per kind, run and layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from etr.report.observations import LoggedAlarm
from etr.report.results import Results
from etr.report.wording import counted


@dataclass(frozen=True, kw_only=True)
class Warned:
    """One alarm of one run, however often it went off."""

    run: str
    """The variant with its seed."""
    name: str
    """Kind of alarm, in words."""
    layer: int | None
    """MoE layer; None for the whole model."""
    message: str
    """What it said the last time."""
    steps: tuple[int, ...]
    """When, ascending."""

    @property
    def when(self) -> str:
        """`at step 40`, or `7 times, steps 40 to 400`."""
        if len(self.steps) == 1:
            return f"at step {self.steps[0]:,}"
        times = counted(len(self.steps), "time")
        return f"{times}, steps {self.steps[0]:,} to {self.steps[-1]:,}"


def gather_alarms(results: Results) -> tuple[Warned, ...]:
    """All alarms of all runs, in the order of the runs and of their first step."""
    groups: dict[tuple[str, str, int | None], list[LoggedAlarm]] = {}
    for row in results.rows:
        name = row.name if len(results.of(row.name)) == 1 else f"{row.name}, seed {row.seed}"
        for alarm in row.metrics.alarms if row.metrics else ():
            groups.setdefault((name, alarm.name, alarm.layer), []).append(alarm)
    return tuple(
        Warned(
            run=run,
            name=kind.replace("_", " "),
            layer=layer,
            message=alarms[-1].message,
            steps=tuple(sorted(alarm.step for alarm in alarms)),
        )
        for (run, kind, layer), alarms in groups.items()
    )


def by_kind(warned: tuple[Warned, ...]) -> dict[str, tuple[Warned, ...]]:
    """Alarms by what they are, the kind of most runs first."""
    kinds: dict[str, list[Warned]] = {}
    for alarm in warned:
        kinds.setdefault(alarm.name, []).append(alarm)
    order = sorted(kinds, key=lambda kind: -num_runs(kinds[kind]))
    return {kind: tuple(kinds[kind]) for kind in order}


def num_runs(warned: Sequence[Warned]) -> int:
    """How many runs alarms are of."""
    return len({alarm.run for alarm in warned})
