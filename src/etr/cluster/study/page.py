"""time-to-loss.md: held-out loss in equal wall time, from the results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from etr.cluster.study.plan import RANKS, EqualTimeStudy
from etr.report.chart import save_svg
from etr.report.statistics import holm
from etr.sheet import table
from etr.study.collection import Collection, measured_with
from etr.study.figures import front
from etr.study.summary import LossDifference, StudyRow, difference

LEVEL = 0.05
"""Of all comparisons of the page together."""
SLOPES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Nats by which the loss falls where steps grow by a factor e, for the map."""
LIMITED = "linear-0.2"
"""Row that must lose if a task is limited by its experts."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A row on one cluster: in as much time as the reference, beside it."""

    block: str
    name: str
    row: StudyRow
    equal_steps: StudyRow
    less: LossDifference
    """Loss less that of the reference, with what matching the times leaves uncertain."""
    slope: float | None
    """Nats by which its loss falls where its steps grow by a factor e; None for as many steps."""
    times: Mapping[str, Any]
    """What was timed of it."""
    base: Mapping[str, Any]
    """What was timed of the reference."""
    survives: bool = False
    """Whether it is told apart after Holm's correction over all rows of the page."""


def page(
    study: Collection, plan: EqualTimeStudy, measured: Mapping[str, dict[str, Any]], out: Path
) -> str:
    """The page; figures are written beside it.

    Args:
        study: what was trained.
        plan: the study.
        measured: by block, what was timed.
        out: folder of the page.
    """
    found = compared(study, plan, measured)
    parts = [_opening(plan, measured), plan.still_to_run(study), _limited(study, plan)]
    for block in dict.fromkeys(one.block for one in found):
        rows = [one for one in found if one.block == block]
        condition = plan.conditions[block]
        path = f"images/time-to-loss-{rows[0].row.results[0]['run']['task']}-{condition.name}.svg"
        title = f"Held-out loss as served against the time of a whole step: {block}"
        points = {one.name: (one.times["seconds"], _mean(one.equal_steps)) for one in rows}
        base = study.row(rows[0].row.results[0]["run"]["task"], plan.reference)
        if base is not None:
            points[plan.reference] = (rows[0].base["seconds"], _mean(base))
        save_svg(front(points, "seconds a step, mean over the schedule"), out / path)
        cells = [[cell(one) for cell in COLUMNS.values()] for one in rows]
        parts.append(f"## {block}\n\n" + table(list(COLUMNS), cells, "lr"))
        parts.append(f"![{title}]({path})\n\n*{title}, equal steps*\n")
    parts += [_verdict(found, plan), _map(study, plan, found), measured_with(study)]
    return "\n".join(part for part in parts if part)


def compared(
    study: Collection, plan: EqualTimeStudy, measured: Mapping[str, dict[str, Any]]
) -> list[Timed]:
    """Every row that was timed and trained for as long as the reference, with most seeds."""
    found: dict[tuple[str, str, str], Timed] = {}
    for block, (task, match, rows) in study.blocks.items():
        base = study.row(task, plan.reference)
        if match != "seconds" or base is None or block not in measured:
            continue
        times, condition = measured[block]["rows"], plan.conditions[block].name
        for row in rows:
            key = (task, condition, row.name)
            heading = found[key].block if key in found else block
            if key in found and len(found[key].row.seeds) >= len(row.seeds):
                continue
            equal, less = study.row(task, row.name), difference(row, base)
            if equal is None or less is None:
                continue
            slope = _slope(row, equal)
            found[key] = Timed(
                block=heading,
                name=row.name,
                row=row,
                equal_steps=equal,
                less=less.widened(abs(slope or 0.0) * times[row.name]["error"]),
                slope=slope,
                times=times[row.name],
                base=times[plan.reference],
            )
    return _corrected(list(found.values()))


def _corrected(found: list[Timed]) -> list[Timed]:
    tested = [n for n, one in enumerate(found) if one.less.p_value is not None]
    kept = holm([found[n].less.p_value or 0.0 for n in tested], LEVEL)
    for n, survives in zip(tested, kept, strict=True):
        found[n] = replace(found[n], survives=survives)
    return found


def _mean(row: StudyRow) -> float:
    return row.mean_loss() or math.nan


def _slope(row: StudyRow, equal: StudyRow) -> float | None:
    """From the two lengths that a row was trained for, each with a schedule of its own."""
    own, other = row.losses(), equal.losses()
    if row.steps == equal.steps:
        return None
    drop = statistics.fmean(other[seed] - own[seed] for seed in own if seed in other)
    return drop / math.log(row.steps / equal.steps)


def _interval(one: Timed) -> str:
    return f"{one.less}{'' if one.survives else ' *'}"


Cell = Callable[[Timed], str]
COLUMNS: dict[str, Cell] = {
    "row": lambda one: f"`{one.name}`",
    "s a step": lambda one: f"{one.times['seconds']:.3f}",
    "of the reference's": lambda one: f"{one.times['mean_ratio']:.2f}",
    "steps": lambda one: str(one.row.steps),
    "as served": lambda one: f"{_mean(one.row):.4f}",
    "less the reference": _interval,
    "at equal steps": lambda one: f"{_mean(one.equal_steps):.4f}",
    "dropless": lambda one: f"{one.row.mean_loss('dropless') or math.nan:.4f}",
    "kept a token": lambda one: f"{one.times['kept_per_token']:.2f}",
    "local share": lambda one: f"{one.times['local_share']:.2f}",
    "bytes between nodes": lambda one: _over(one, "bytes_between_nodes"),
    "MaxVio": lambda one: f"{one.row.average('max_violation_last'):.2f}",
}


def _over(one: Timed, key: str) -> str:
    base = one.base[key]
    return f"{one.times[key] / base:.2f}" if base else "-"


def _opening(plan: EqualTimeStudy, measured: Mapping[str, dict[str, Any]]) -> str:
    if not measured:
        return "# Held-out loss in equal wall time\n"
    one = next(iter(measured.values()))
    padded = ", ".join(f"`{name}`" for name in plan.padded)
    return (
        "<!-- generated by `etr cluster study`; do not edit, make it again -->\n\n"
        "# Held-out loss in equal wall time, on an emulated cluster\n\n"
        f"Each row is trained for as many steps as fit into the time that `{plan.reference}` takes "
        "for its own, with a cosine and a capacity schedule of its own length. The reference is "
        "the strongest baseline that needs no new method: a learned linear router that sends no "
        f"padding, in chunks. {padded} send buffers as large as the capacity; all others send as "
        "the reference does.\n\n"
        f"**What is emulated.** {RANKS} ranks in network namespaces of one machine, {plan.inter} "
        f"between nodes in each direction, {plan.intra} inside a node. Computation sleeps: a row "
        "of an expert for the ratio in the heading times what the row takes over its share of a "
        "node's uplink (2x2), everything else in proportion to its FLOPs. Real are the routers, "
        "what they want of further text, every byte between ranks, and the sum of gradients after "
        f"the backward pass. A step has {one['tokens_per_rank']:,} tokens a rank; it is timed at "
        f"{plan.points} points of the schedule, all rows in turn, {plan.rounds} times over, with "
        "the weights of the end of training. Losses are learned off the network, in one process: "
        "ranks would learn the same, but for sums in another order, and for padded rows, whose "
        "capacity counts each rank's tokens alone when timed. *Own* text gives each rank domains "
        "of its own.\n\n"
        "Losses are held out, in nats, as served. Differences are paired by seed and document; "
        "Student's 95 % interval covers both, and what the rounds of the clock leave open of the "
        "number of steps. A star marks what Holm's correction over all rows of the page does not "
        "tell apart.\n"
    )


def _limited(study: Collection, plan: EqualTimeStudy) -> str:
    lines = []
    for task in dict.fromkeys(task for task, _, _ in study.blocks.values()):
        base, least = study.row(task, plan.reference), study.row(task, LIMITED)
        if base is None or least is None:
            continue
        found = difference(least, base)
        if found is not None:
            lines.append(
                f"- `{task}`: `{LIMITED}` less `{plan.reference}` is {found}: "
                f"{'limited' if found.verdict == 'higher' else 'not shown to be limited'} by its "
                "experts."
            )
    return "## Are the tasks limited by their experts?\n\n" + "\n".join(lines) + "\n"


def _verdict(found: Sequence[Timed], plan: EqualTimeStudy) -> str:
    if not found:
        return ""
    lines = []
    for block in dict.fromkeys(one.block for one in found):
        rows = [one for one in found if one.block == block]
        best = min(rows, key=lambda one: one.less.mean)
        lower = [f"`{one.name}`" for one in rows if one.survives and one.less.verdict == "lower"]
        lines.append(
            f"- {block}: the lowest is `{best.name}`, {best.less} against `{plan.reference}`; "
            f"told apart as lower: {', '.join(lower) or 'none'}."
        )
    return "## Verdicts\n\n" + "\n".join(lines) + "\n"


def _map(study: Collection, plan: EqualTimeStudy, found: Sequence[Timed]) -> str:
    """Who would win were the loss to fall faster or slower with steps."""
    blocks = list(dict.fromkeys(one.block for one in found))
    if not blocks:
        return ""
    lines = []
    for slope in SLOPES:
        cells = [f"{slope:g}"]
        for block in blocks:
            guessed = {plan.reference: 0.0}
            for one in found:
                base = study.row(one.row.results[0]["run"]["task"], plan.reference)
                less = difference(one.equal_steps, base) if base else None
                if one.block == block and less is not None:
                    saved = slope * math.log(one.times["mean_ratio"])
                    guessed[one.name] = less.mean + saved
            best = min(guessed, key=guessed.__getitem__)
            cells.append(f"`{best}` {guessed[best]:+.3f}")
        lines.append(cells)
    slopes = [one.slope for one in found if one.slope is not None]
    seen = f" Slopes of this page's rows: {min(slopes):.2f} to {max(slopes):.2f}." if slopes else ""
    return (
        "## Who would win elsewhere\n\n"
        "The difference at equal steps, and what the time saved is worth where the loss falls by "
        "so many nats when steps grow by a factor e: the lowest row of each cluster."
        f"{seen}\n\n" + table(("nats for e times the steps", *blocks), lines, "l")
    )


__all__ = ["Timed", "compared", "page"]
