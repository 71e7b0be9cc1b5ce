"""A page of the documentation, generated from results so that its numbers cannot go stale."""

from collections.abc import Mapping
from typing import Any

from etr.report.columns import COLUMNS as TABLE
from etr.report.columns import (
    Cell,
    Column,
    difference_cell,
    difference_range_cell,
    footnotes,
    loss_cell,
    number_cell,
)
from etr.report.reading import NOTHING, Finding, read
from etr.report.results import ResultsLike, load_results
from etr.report.summary import Summary, summarize
from etr.report.table import markdown_rows
from etr.report.wording import TIMES, counted, fixed, listed, significant
from etr.sheet import escape_markdown

GENERATED = "<!-- Generated from results.json by etr.report; do not edit, make it again. -->"

_BY_HEADER = {column.header: column for column in TABLE}
_VARIANT = _BY_HEADER["variant"]

LOSSES = (
    _VARIANT,
    Column(header="val loss, as served", unit="nats/token", cell=loss_cell),
    Column(header="Δ baseline", unit="nats/token", cell=difference_cell),
    Column(header="Δ over seeds", unit="least to most", cell=difference_range_cell),
    Column(
        header="val loss, dropless",
        unit="nats/token",
        cell=lambda variant: loss_cell(variant, "val_loss_dropless"),
    ),
    Column(
        header="Δ baseline, dropless",
        unit="nats/token",
        cell=lambda variant: difference_cell(variant, "val_loss_dropless"),
    ),
    Column(header="served by", numeric=False, cell=lambda variant: Cell(text=variant.selection)),
)
COSTS = (
    _VARIANT,
    *(_BY_HEADER[name] for name in ("router", "capacity", "kept train", "kept eval", "MaxVio")),
    *(_BY_HEADER[name] for name in ("step time", "experts")),
    Column(
        header="all steps",
        unit="TFLOP",
        cell=number_cell("expert_flops_total", significant, scale=1e-12, relative=True),
    ),
    _BY_HEADER["parameters"],
)


def results_markdown(results: ResultsLike, title: str, command: str) -> str:
    """A comparison as a page of GitHub-flavoured Markdown.

    Args:
        results: results.json, its folder, its content or loaded results.
        title: heading of the page.
        command: what a reader types to make it again; the recorded command if empty.
    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    results = load_results(results)
    summary = summarize(results)
    reading = read(results)
    notes = "".join(f"- {escape_markdown(note)}\n" for note in footnotes(summary))
    parts = [
        GENERATED,
        f"# {escape_markdown(title)}",
        _scope(summary),
        _environment(results.environment),
        _fenced(command or results.command or "not recorded"),
        "## Held-out loss",
        markdown_rows(LOSSES, summary.variants),
        "## What it costs",
        markdown_rows(COSTS, summary.variants),
        notes,
        "## What it gains",
        _findings(reading.gains, NOTHING),
        "## Where it loses",
        _findings(reading.losses, NOTHING),
        "## Undecided",
        _findings(reading.undecided, "Every comparable loss is decided."),
    ]
    if reading.caveats:
        caveats = "".join(f"- {escape_markdown(caveat)}\n" for caveat in reading.caveats)
        parts += ["## Read with care", caveats]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _scope(summary: Summary) -> str:
    seeds = sorted({seed for variant in summary.variants for seed in variant.seeds})
    numbers = listed([str(seed) for seed in seeds])
    steps = summary.baseline.estimates.get("steps")
    length = f", {fixed(steps.mean, 0)} steps for the baseline" if steps else ""
    return (
        f"{counted(len(summary.variants), 'variant')} {TIMES} {counted(len(seeds), 'seed')}"
        f" ({numbers}){length}. Baseline: {escape_markdown(summary.baseline.name)}."
    )


def _environment(environment: Mapping[str, Any]) -> str:
    facts = [
        f"{escape_markdown(str(key))} {escape_markdown(str(value))}"
        for key, value in environment.items()
        if not isinstance(value, Mapping | list)
    ]
    return f"Measured with: {', '.join(facts)}." if facts else ""


def _fenced(command: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "```"
    while fence in command:
        fence += "`"
    return f"{fence}sh\n{command}\n{fence}"


def _findings(findings: tuple[Finding, ...], nothing: str) -> str:
    if not findings:
        return nothing
    return "".join(
        f"- **{escape_markdown(finding.name)}**: {escape_markdown('; '.join(finding.parts))}.\n"
        for finding in findings
    )
