"""winner.md: forms of ETR at equal expert FLOPs, measured as they are served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from etr.report.chart import save_svg
from etr.report.statistics import holm
from etr.sheet import table
from etr.study.collection import Collection, measured_with
from etr.study.figures import front
from etr.study.run import Run, load_model
from etr.study.served import WINDOW, measure_served
from etr.study.study import Study, StudyRunner
from etr.study.summary import LossDifference, StudyRow, difference

LEVEL = 0.05
"""Of all comparisons of the verdict together."""
TASKS_TO_WIN = 2
"""Tasks on which a form must be lower than every row beside it; on no other may it be higher."""


@dataclass(frozen=True, kw_only=True)
class WinnerRunner(StudyRunner):
    """The page is ``winner.md``, the results lie in ``winner/``."""

    name: ClassVar[str] = "winner"

    beside: tuple[str, ...]
    """Names of the rows that a form must beat."""

    def measures(self, run: Run) -> dict[str, Any]:
        return measure_served(run, load_model(run, self.weights))

    def page(self, study: Collection) -> str:
        parts = [_OPENING, self.study.still_to_run(study)]
        found = compared(study, self.study, self.beside)
        if found:
            parts.append("## Verdict\n\n" + verdict(found, self.beside))
        for block, (task, match, rows) in reversed(study.blocks.items()):
            base = study.row(task, self.study.reference)
            if match == "steps" or not rows or base is None:
                continue
            own = self.study.block(block)
            base = next((r for r in _equal(study, own.seeds[0], task) if r.name == base.name), base)
            columns = self.columns(base, rows)
            cells = [[cell(row) for cell in columns.values()] for row in (base, *rows)]
            parts.append(f"## {block}\n\n" + table(list(columns), cells))
            points = {row.name: _cost_and_loss(row) for row in (base, *rows)}
            known = {n: (x, y) for n, (x, y) in points.items() if x is not None and y is not None}
            if len(known) > 1:
                path = f"images/winner-{block.replace(', ', '-')}.svg"
                title = f"Held-out loss as served against expert work of a served token: {block}"
                axis = "expert FLOPs of a served token and layer"
                save_svg(front(known, axis), self.out / path)
                parts.append(f"![{title}]({path})\n\n*{title}*\n")
        return "\n".join(part for part in (*parts, measured_with(study)) if part)

    def columns(
        self, base: StudyRow, rows: tuple[StudyRow, ...]
    ) -> dict[str, Callable[[StudyRow], str]]:
        """What the page says of a row; differences from the rows beside it in the same block."""
        others = {row.name: row for row in rows if row.name in self.beside}

        def less(other: StudyRow) -> Callable[[StudyRow], str]:
            def cell(row: StudyRow) -> str:
                return "" if row.name == other.name else str(difference(row, other) or "")

            return cell

        flops = base.average("expert_flops")
        return {
            "row": lambda row: f"`{row.name}`",
            "steps": lambda row: str(row.steps),
            "seeds": lambda row: str(len(row.seeds)),
            "as served": lambda row: _number(row.mean_loss()),
            **{f"less {name}": less(row) for name, row in others.items()},
            "dropless": lambda row: _number(row.mean_loss("dropless")),
            "as served less dropless": _gap,
            "kept in training": lambda row: f"{row.average('kept_per_token_last'):.3f}",
            "kept served": lambda row: _number(_kept(row), 3),
            "expert FLOPs of training": lambda row: f"{row.average('expert_flops') / flops:.2f}",
            "of a served token, kFLOPs": lambda row: _number(_kilo(row), 1),
            f"different in {WINDOW} tokens": lambda row: _number(row.measured("unique_experts"), 1),
            "router's share of time": lambda row: _number(row.measured("router_share"), 2),
        }


@dataclass(frozen=True, kw_only=True)
class Beaten:
    """A form less a row that it must beat, on one task at equal expert FLOPs."""

    task: str
    name: str
    other: str
    less: LossDifference
    survives: bool = False
    """Whether it is told apart after Holm's correction over the whole verdict."""


def compared(study: Collection, plan: Study, beside: tuple[str, ...]) -> list[Beaten]:
    """Every form of the verdict less every row beside it; the search has no part in it."""
    found = []
    for block, (task, match, rows) in study.blocks.items():
        if match == "steps" or block != task:
            continue
        by_name = {row.name: row for row in rows}
        for name, row in by_name.items():
            for other in beside:
                if name in beside or other not in by_name:
                    continue
                less = difference(row, by_name[other])
                if less is not None:
                    found.append(Beaten(task=task, name=name, other=other, less=less))
    tested = [one for one in found if one.less.p_value is not None]
    kept = holm([one.less.p_value or 0.0 for one in tested], LEVEL)
    sure = {id(one) for one, survives in zip(tested, kept, strict=True) if survives}
    return [replace(one, survives=id(one) in sure) for one in found]


def wins(found: list[Beaten], name: str, beside: tuple[str, ...]) -> bool:
    """Whether a form is lower than all rows beside it on enough tasks, and nowhere higher."""
    own = [one for one in found if one.name == name]
    tasks = dict.fromkeys(one.task for one in own)

    def lower(task: str) -> bool:
        sides = {one.other: one for one in own if one.task == task}
        return set(sides) == set(beside) and all(
            one.survives and one.less.verdict == "lower" for one in sides.values()
        )

    higher = any(one.less.verdict == "higher" for one in own)
    return sum(map(lower, tasks)) >= TASKS_TO_WIN and not higher


def verdict(found: list[Beaten], beside: tuple[str, ...]) -> str:
    """A table of every comparison, and a sentence."""
    lines = [
        [
            f"`{one.name}`",
            f"`{one.task}`",
            f"`{one.other}`",
            str(one.less),
            one.less.verdict,
            "yes" if one.survives else "no",
        ]
        for one in found
    ]
    head = ("form", "task", "less", "nats", "loss", f"after Holm's correction of {len(found)}")
    names = dict.fromkeys(one.name for one in found)
    winners = [f"`{name}`" for name in names if wins(found, name, beside)]
    others = " and ".join(f"`{name}`" for name in beside)
    rule = f"lower than {others} on {TASKS_TO_WIN} tasks or more, and higher on none"
    said = f"{', '.join(winners)}: {rule}." if winners else f"No form is {rule}."
    return said + "\n\n" + table(head, lines)


def _equal(study: Collection, seed: int, task: str) -> list[StudyRow]:
    """Rows at equal steps of a task that have a seed; those with most seeds first."""
    rows = [
        row
        for of, match, block in study.blocks.values()
        if (of, match) == (task, "steps")
        for row in block
        if seed in row.seeds
    ]
    return sorted(rows, key=lambda row: -len(row.seeds))


def _kept(row: StudyRow) -> float | None:
    value = row.final("threshold", "kept_per_token")
    return row.final("dropless", "kept_per_token") if value is None else value


def _gap(row: StudyRow) -> str:
    served, whole = row.mean_loss(), row.mean_loss("dropless")
    return "" if served is None or whole is None else f"{served - whole:+.4f}"


def _kilo(row: StudyRow) -> float | None:
    value = row.measured("expert_flops")
    return None if value is None else value / 1000


def _cost_and_loss(row: StudyRow) -> tuple[float | None, float | None]:
    return row.measured("expert_flops"), row.mean_loss()


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


_OPENING = """<!-- generated by `etr compare --preset winner`; do not edit, make it again -->

# Served as trained, at a small capacity

Forms of ETR at equal expert FLOPs of training: each with as many steps as cost what the experts of
`linear-1.1` cost. Planned in [winner-plan.md](winner-plan.md). Losses are held out; *as served* is
by calibrated thresholds, dropless for rows that have none. Differences are paired by seed and by
held-out document, with Student's 95 % interval over both. Kept: pairs a token and layer, in
training over the last tenth of the steps. FLOPs of a served token count what stands in for experts
too. Models are small, and trained for minutes.
"""


__all__ = ["Beaten", "WinnerRunner", "compared", "verdict", "wins"]
