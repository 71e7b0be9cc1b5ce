"""rivals.md: every router on the same work, each beside what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from etr.methods import METHODS, Card
from etr.moe import ROUTERS
from etr.report.chart import save_svg
from etr.report.statistics import holm
from etr.sheet import escape_markdown, table
from etr.study.collection import Collection, measured_with
from etr.study.figures import costs
from etr.study.grid import MATCHES, Match
from etr.study.run import Run, load_model
from etr.study.served import RANKS, WINDOW, measure_served
from etr.study.study import Study, StudyRunner
from etr.study.summary import LossDifference, StudyRow, difference

LEVEL = 0.05
"""Of all comparisons of the page together."""
Cell = Callable[[StudyRow, StudyRow], str]


@dataclass(frozen=True, kw_only=True)
class RivalsRunner(StudyRunner):
    """Runs a study of methods; the page is ``rivals.md``, the results lie in ``rivals/``."""

    name: ClassVar[str] = "rivals"

    claimed: Mapping[str, str]
    """What authors say that a method gains, by its name."""

    def measures(self, run: Run) -> dict[str, Any]:
        return measure_served(run, load_model(run, self.weights))

    def page(self, study: Collection) -> str:
        found = compared(study, self.study)
        images = []
        for task in dict.fromkeys(task for task, _, _ in study.blocks.values()):
            rows = [one for one in found if (one.task, one.match) == (task, "steps")]
            if not rows:
                continue
            for key, what in (("expert_flops", "expert FLOPs"), ("step_seconds_median", "time")):
                path = f"images/rivals-{task}-{what.split()[-1].lower()}.svg"
                title = f"Held-out loss as served on {task} against {what} of a step"
                save_svg(costs({one.row.name: one.row for one in rows}, key), self.out / path)
                images.append(f"![{title}]({path})\n\n*{title}*\n")
        parts = [
            _OPENING,
            self.study.still_to_run(study),
            *images,
            *tables(found),
            _several(found),
            sentences(found),
        ]
        parts += [authors(found, self.claimed), measured_with(study)]
        return "\n".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A method beside its reference, on one task at one kind of equal work."""

    task: str
    match: Match
    card: Card
    row: StudyRow
    base: StudyRow
    found: LossDifference
    """Loss of the row less that of the base, as served."""
    survives: bool = False
    """Whether it is told apart after Holm's correction."""

    @property
    def side(self) -> str:
        """lower, higher, or that it cannot be said."""
        return self.found.verdict


def compared(study: Collection, plan: Study) -> list[Compared]:
    """Every method with a result and one of its reference; the correction is over all of them."""
    found: dict[tuple[str, Match, str], Compared] = {}
    for task, match, rows in study.blocks.values():
        for row in rows:
            base = study.row(task, plan.reference_of(row.name))
            card = METHODS.get(row.name)
            if card is None or base is None or base.name == row.name:
                continue
            own = (study.row(task, row.name) if match == "steps" else row) or row
            less = difference(own, base)
            if less is not None:
                key = (task, match, row.name)
                found[key] = Compared(
                    task=task, match=match, card=card, row=own, base=base, found=less
                )
    tested = [key for key, one in found.items() if one.found.p_value is not None]
    kept = holm([found[key].found.p_value or 0.0 for key in tested], LEVEL)
    for key, survives in zip(tested, kept, strict=True):
        one = found[key]
        found[key] = Compared(**{**vars(one), "survives": survives})
    return list(found.values())


def tables(found: list[Compared]) -> list[str]:
    """A table for each task, kind of equal work, and for methods that look at later tokens."""
    parts = []
    for task, match in dict.fromkeys((one.task, one.match) for one in found):
        for causal, title in ((True, "causal"), (False, "looking at later tokens in training")):
            rows = [
                one
                for one in found
                if (one.task, one.match) == (task, match) and bool(one.card.causal) == causal
            ]
            if not rows:
                continue
            cells = [[cell(one.row, one.base) for cell in COLUMNS.values()] for one in rows]
            heading = f"## `{task}`, {MATCHES[match]}: {title}\n\n"
            parts.append(heading + table(list(COLUMNS), cells))
    return parts


def _number(key: str, digits: int = 2, scale: float = 1.0) -> Cell:
    def cell(row: StudyRow, base: StudyRow) -> str:
        value = row.measured(key)
        return "" if value is None else f"{scale * value:.{digits}f}"

    return cell


def _loss(mode: str) -> Cell:
    def cell(row: StudyRow, base: StudyRow) -> str:
        value = row.mean_loss(mode)
        return "" if value is None else f"{value:.4f}"

    return cell


def _experts(row: StudyRow, base: StudyRow) -> str:
    mean, spread = row.measured("experts_mean"), row.measured("experts_spread")
    return "" if mean is None else f"{mean:.2f} ± {spread:.2f}"


def _dropped(row: StudyRow) -> str:
    """Empty where tokens ask for any number: what is kept does not say what was dropped."""
    router = row.results[0]["config"]["model"]["routing"]["router"]
    traits = ROUTERS.parse(router).traits
    return f"{row.drop_rate():.1%}" if traits.fixed_k and traits.tokens_choose else ""


def _ratio(key: str) -> Callable[[StudyRow, StudyRow], float]:
    def ratio(row: StudyRow, base: StudyRow) -> float:
        per_step = key == "expert_flops"
        own, other = (x.average(key) / (x.steps if per_step else 1) for x in (row, base))
        return own / other

    return ratio


FLOPS, TIME, SIZE = (_ratio(key) for key in ("expert_flops", "step_seconds_median", "parameters"))

COLUMNS: dict[str, Cell] = {
    "method": lambda row, base: f"`{row.name}`",
    "against": lambda row, base: f"`{base.name}`",
    "steps": lambda row, base: str(row.steps),
    "seeds": lambda row, base: str(len(row.seeds)),
    "as served": _loss("served"),
    "less its reference": lambda row, base: str(difference(row, base)),
    "dropless": _loss("dropless"),
    "MaxVio": _number("max_violation"),
    "balance loss": _number("balance_loss", 3),
    "dropped in training": lambda row, base: _dropped(row),
    "experts a token": _experts,
    f"different in {WINDOW} tokens": _number("unique_experts", 1),
    "router's share of time": _number("router_share"),
    f"kB a token between nodes, {RANKS} ranks": _number("bytes_between_nodes", 2, 1e-3),
    "parameters, M": lambda row, base: f"{row.average('parameters') / 1e6:.3f}",
    "expert MFLOPs a token": lambda row, base: f"{row.flops_of_a_token() / 1e6:.3f}",
    "ms a step": lambda row, base: f"{1000 * row.average('step_seconds_median'):.0f}",
}


def _several(found: list[Compared]) -> str:
    tested = [one for one in found if one.found.p_value is not None]
    apart = [one for one in tested if one.side in ("lower", "higher")]
    kept = [one for one in tested if one.survives]
    text = (
        f"## How many comparisons\n\n{len(tested)} differences have an interval. The 95 % interval "
        f"of {len(apart)} excludes 0, where {LEVEL * len(tested):.1f} would if no method differed "
        f"from its reference. After Holm's correction {len(kept)} can be told apart.\n"
    )
    lines = [
        [f"`{one.card.name}`", f"`{one.task}`", MATCHES[one.match], str(one.found), one.side]
        for one in kept
    ]
    head = ("method", "task", "what is equal", "less its reference", "loss")
    return text + ("\n" + table(head, lines) if lines else "")


def sentences(found: list[Compared]) -> str:
    """One sentence a method: what it gains, and what it costs."""
    lines = []
    for name in dict.fromkeys(one.card.name for one in found):
        own = [one for one in found if one.card.name == name]
        gains = "; ".join(map(_gain, own))
        flops, time, size = (
            sum(ratio(one.row, one.base) for one in own) / len(own) for ratio in (FLOPS, TIME, SIZE)
        )
        lines.append(
            f"- **{escape_markdown(own[0].card.title)}** {gains}; a step costs {flops:.2f} times "
            f"the expert FLOPs and {time:.2f} times the time, with {size:.2f} times the parameters."
        )
    return "## What each gains, and what it costs\n\n" + "\n".join(lines) + "\n"


def _gain(one: Compared) -> str:
    where = f"on `{one.task}` at {MATCHES[one.match]}"
    if one.found.interval is None:
        return f"differs by {one.found.mean:+.4f} nats from `{one.base.name}` {where} (one seed)"
    if one.side not in ("lower", "higher"):
        return f"cannot be told apart from `{one.base.name}` {where} ({one.found.mean:+.4f} nats)"
    verb = "gains" if one.side == "lower" else "loses"
    still = "after" if one.survives else "but not after"
    return f"{verb} {abs(one.found.mean):.4f} nats {where}, {still} the correction"


def authors(found: list[Compared], claimed: Mapping[str, str]) -> str:
    """Gains that their authors report and that do not show here, with our number beside theirs."""
    lines = [
        [
            f"`{one.card.name}`",
            one.card.paper,
            claimed[one.card.name],
            f"`{one.task}`",
            MATCHES[one.match],
            str(one.found),
        ]
        for one in found
        if one.card.name in claimed and one.side != "lower"
    ]
    head = ("method", "paper", "authors", "task", "what is equal", "here, nats")
    return "## Gains that do not show at this size\n\n" + table(head, lines) if lines else ""


_OPENING = f"""<!-- generated by `etr compare --preset rivals`; do not edit, make it again -->

# Routers on the same work

Every method on the shelf beside the row that its card names, at equal steps, and at equal expert
FLOPs: with as many steps as cost what the reference's experts cost. Same batches and start for a
seed; losses are held out, in nats; *as served* is by calibrated thresholds, dropless for rows that
have none. Differences are paired by seed and by held-out document; Student's 95 % interval covers
both, so that it speaks of other seeds and of other text of these domains. What a layer does with
tokens (MaxVio, balance loss, experts) is measured as served; a balance loss of 1 is not balance:
read it with MaxVio. What training drops is left out where tokens ask for any number of experts.
Bytes are those of {RANKS} ranks on two nodes with blocks of experts and of tokens; times are
processor seconds of runs that shared the machine with other work: a few hundredths of their ratio
say nothing. Models are small, and trained for minutes: what differs here need not differ at scale.
"""


__all__ = ["Compared", "RivalsRunner", "authors", "compared", "sentences", "tables"]
