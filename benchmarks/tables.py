"""Results as tables of text, for the screen and the page alike."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measures.few import HF
from benchmarks.measures.router import ETR_ROUTER, GRAP, GRAP_ROUTER, LINEAR, LINEAR_ROUTER
from benchmarks.measures.routing import LAYER
from benchmarks.results import STEP, CaseResult, Row
from benchmarks.spread import Spread, log_slope
from benchmarks.systems.floors import DENSE
from benchmarks.targets import Target, Verdict, judge_all

NONE = "-"


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """Args:
    title: of the table.
    columns: their heads; the first holds names, the rest numbers or notes.
    rows: cells.
    notes: lines below it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()


def targets_table(results: list[CaseResult]) -> TextTable:
    """Every target with its measured value."""
    columns = ["target", "limit", "worst", "quartiles", "best", "cases met", "outcome", "reason"]
    return TextTable(
        title="Targets",
        columns=columns,
        rows=[target_row(verdict) for verdict in judge_all(results)],
    )


def target_row(verdict: Verdict) -> list[str]:
    """One line of the targets table."""
    target, readings = verdict.target, verdict.readings
    sign = "≤" if target.bound == "at most" else "≥"
    head = [target.name, f"{sign} {show(target, target.limit)}"]
    if not readings:
        return [*head, NONE, NONE, NONE, NONE, verdict.outcome, ""]
    worst, best = readings[0], readings[-1]
    place = worst.case.partition("/")[2].replace("/", ", ")
    reason = f"worst: {place}" + (f"; {verdict.reason}" if verdict.reason else "")
    return [
        *head,
        show(target, worst.value.median),
        f"{show(target, worst.value.low)} to {show(target, worst.value.high)}",
        show(target, best.value.median),
        f"{verdict.met} of {len(readings)}",
        verdict.outcome,
        reason if verdict.outcome == "missed" else "",
    ]


def show(target: Target, value: float) -> str:
    """A value in the target's unit."""
    return f"{value:.1%}" if target.unit == "%" else f"{value:.2f}x"


def case_table(result: CaseResult) -> TextTable:
    """All rows of one case."""
    tables = {"layer": layer_table, "growth": layer_table, "memory": layer_table}
    return tables.get(result.group, plain_table)(result)


def layer_table(result: CaseResult) -> TextTable:
    """Systems on the layer: times over the dense floor, per kept pair."""
    base = result.row(DENSE) or result.ours
    columns = [
        "system", f"over {base.system if base else DENSE}", "quartiles", "forward alone", "seconds",
        "rounds", "kept pairs", "dropped", "saved", "peak", "operations", "routing",
    ]  # fmt: skip
    return TextTable(
        title=result.name,
        columns=columns,
        rows=[layer_row(result, row, base) for row in result.rows if not row.refused],
        notes=refusals(result),
    )


def refusals(result: CaseResult) -> tuple[str, ...]:
    """Who has no time, and why."""
    return tuple(f"{row.system}: {row.refused}" for row in result.rows if row.refused)


def layer_row(result: CaseResult, row: Row, base: Row | None) -> list[str]:
    """One system."""
    name = f"{row.system} *" if row.default else row.system
    counts = [
        f"{row.kept_pairs:,}" if row.kept_pairs is not None else NONE,
        f"{row.drop_rate:.1%}" if row.drop_rate is not None else NONE,
        megabytes(row.saved_bytes),
        megabytes(row.peak_bytes),
        NONE if row.operations is None else str(row.operations),
        row.routing or NONE,
    ]
    seconds = row.spread_of(STEP)
    if seconds is None:
        return [name, NONE, NONE, NONE, NONE, NONE, *counts]
    ratio, forward = result.ratio(row, base), result.ratio(row, base, "forward")
    return [
        name,
        *ratio_cells(ratio),
        f"{forward.median:.2f}" if forward else NONE,
        f"{seconds.median:.4f}",
        str(seconds.count),
        *counts,
    ]


def plain_table(result: CaseResult) -> TextTable:
    """Rows over the first: of the layer, the linear router, the baseline."""
    base = next(
        (row for name in (LAYER, LINEAR, HF, "baseline") if (row := result.row(name))),
        result.rows[0],
    )
    counted = any(row.operations is not None for row in result.rows)
    measures = [name for name in ("forward", STEP, "step") if base.seconds.get(name)]
    columns = ["system"]
    for measure in measures:
        columns += [f"{measure}, over {base.system}", "quartiles", "seconds"]
    if counted:
        columns += ["operations", "dropped"]
    rows = []
    for row in result.rows:
        cells = [row.system]
        for measure in measures:
            seconds = row.spread_of(measure)
            ratio = result.ratio(row, base, measure)
            cells += [*ratio_cells(ratio), f"{seconds.median:.5f}" if seconds else row.refused]
        if counted:
            cells += [NONE if row.operations is None else str(row.operations)]
            cells += [NONE if row.drop_rate is None else f"{row.drop_rate:.1%}"]
        rows.append(cells)
    return TextTable(title=result.name, columns=columns, rows=rows)


def slopes_table(results: list[CaseResult]) -> TextTable:
    """Exponents of time over size, by what grows."""
    rows = []
    growth = [result for result in results if result.group == "growth"]
    size_of = {"tokens": "num_tokens", "experts": "num_experts", "width": "hidden_size"}
    for label, size in size_of.items():
        grown = [result for result in growth if result.sizes["label"] == label]
        names = dict.fromkeys(row.system for result in grown for row in result.rows)
        rows += [slope_row(f"layer, {label}", name, grown, size) for name in names]
    router = [r for r in results if r.group == "router" and r.sizes["dtype"] == "float32"]
    for experts in sorted({r.sizes["num_experts"] for r in router}):
        grown = [r for r in router if r.sizes["num_experts"] == experts]
        rows += [
            slope_row(f"router, width at {experts} experts", name, grown, "hidden_size")
            for name in (GRAP, LINEAR, GRAP_ROUTER, LINEAR_ROUTER, ETR_ROUTER)
        ]
    for width in sorted({r.sizes["hidden_size"] for r in router}):
        grown = [r for r in router if r.sizes["hidden_size"] == width]
        rows += [
            slope_row(f"router, experts at width {width}", name, grown, "num_experts")
            for name in (GRAP, LINEAR)
        ]
    return TextTable(
        title="Growth: p in time ~ size ^ p",
        columns=["what grows", "system", "from", "to", "p"],
        rows=[row for row in rows if row],
    )


def slope_row(label: str, system: str, results: list[CaseResult], size: str) -> list[str]:
    """The slope of one system's forward+backward; empty where fewer than two sizes were timed."""
    points = [
        (float(result.sizes[size]), timed.median)
        for result in results
        if (row := result.row(system)) is not None and (timed := row.spread_of(STEP)) is not None
    ]
    if len({x for x, _ in points}) < 2:
        return []
    sizes, values = zip(*sorted(points), strict=True)
    slope = log_slope(sizes, values)
    return [label, system, f"{sizes[0]:,.0f}", f"{sizes[-1]:,.0f}", f"{slope:.2f}"]


def losses_table(results: list[CaseResult]) -> TextTable:
    """Every case in which somebody else is faster than what the library picks by itself."""
    rows = []
    for result in results:
        for row in result.rows:
            ratio = result.ratio(result.ours, row)
            loses = ratio is not None and ratio.median > 1 and row.kind != "floor"
            if result.group == "layer" and loses and not row.default:
                rows.append([row.system, result.name.partition("/")[2], *ratio_cells(ratio)])
    return TextTable(
        title="Where etr loses",
        columns=["faster system", "case", "etr over it", "quartiles"],
        rows=sorted(rows, key=lambda row: -float(row[2])),
    )


def ratio_cells(ratio: Spread | None) -> list[str]:
    """Median, and quartiles."""
    if ratio is None:
        return [NONE, NONE]
    return [f"{ratio.median:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f}"]


def megabytes(count: int | None) -> str:
    """Bytes as megabytes."""
    return NONE if count is None else f"{count / 1e6:.1f} MB"
