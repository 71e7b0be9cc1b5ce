"""The parts of the page that are tables and sentences: results, what they say, alarms."""

from collections.abc import Sequence
from html import escape

from etr.prose import prose_html
from etr.report.alarms import Warned
from etr.report.columns import COLUMNS, RUN_COLUMNS, Column, footnotes
from etr.report.reading import NOTHING, Finding, Reading, read
from etr.report.results import Results
from etr.report.sources import Part
from etr.report.style import variant_style
from etr.report.summary import VariantSummary, summarize
from etr.report.wording import sentence


def part_html(part: Part, place: int, all_runs: Results) -> str:
    """The table of one part, and what its numbers say.

    Args:
        part: a comparison, or single runs.
        place: number of the part, for ids.
        all_runs: all rows of the page, whose order decides how each variant looks.
    """
    compared = part.results.is_comparison
    heading = "Results" if compared else "Runs"
    if part.name:
        heading = f"{heading}: {part.name}" if compared else part.name
    reading = read(part.results)
    words = _reading(reading, place) if compared else _caveats(reading)
    return f"{_table(part.results, heading, place, all_runs)}\n{words}"


def _table(results: Results, heading: str, place: int, all_runs: Results) -> str:
    summary = summarize(results)
    columns = COLUMNS if results.is_comparison else RUN_COLUMNS
    heads = "".join(
        f'<th scope="col"{_numeric(column)}>{escape(column.header)}'
        f"<small>{escape(column.unit)}</small></th>"
        for column in columns
    )
    rows = "\n".join(
        _table_row(all_runs.names.index(variant.name), columns, variant)
        for variant in summary.variants
    )
    notes = "".join(f"<li>{prose_html(note)}</li>" for note in footnotes(summary, columns))
    name = f"results-{place}"
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(heading)}</h2>\n'
        f'<div class="card scroll" tabindex="0" role="region" aria-labelledby="{name}">\n'
        f'<table class="results">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        f'</table>\n</div>\n<ul class="notes">{notes}</ul>\n</section>'
    )


def _numeric(column: Column) -> str:
    return ' class="num"' if column.numeric else ""


def _table_row(index: int, columns: Sequence[Column], variant: VariantSummary) -> str:
    first, *others = columns
    cells = [f'<th scope="row">{_swatch(index)}{escape(first.cell(variant).text)}</th>']
    for column in others:
        cell = column.cell(variant)
        classes = [*(["num"] if column.numeric else []), *([cell.tone] if cell.detail else [])]
        chip = ' class="chip"' if cell.tone in ("good", "bad", "quiet") else ""
        detail = f"<small{chip}>{escape(cell.detail)}</small>" if cell.detail else ""
        if chip:
            detail = f"<br>{detail}"
        cells.append(f'<td class="{" ".join(classes)}">{escape(cell.text)}{detail}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _swatch(index: int) -> str:
    """The variant's line as in the figures, so that the table is their legend too."""
    look = variant_style(index)
    dashes = " ".join(f"{2 * length:g}" for length in look.dashes)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    color = f"var({look.tint.variable})"
    return (
        '<svg class="swatch" viewBox="0 0 34 10" aria-hidden="true">'
        f'<path d="M0 5H34" fill="none" style="stroke:{color}" stroke-width="2.5"{dashed}/></svg>'
    )


def _reading(reading: Reading, place: int) -> str:
    name = f"reading-{place}"
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">What the numbers say</h2>\n'
        '<div class="reading">\n'
        + _findings("gains", "What it gains", reading.gains, NOTHING)
        + _findings("losses", "Where it loses", reading.losses, NOTHING)
        + _findings("open", "Undecided", reading.undecided, "Every comparable loss is decided.")
        + _caveat_card(reading)
        + "</div>\n</section>"
    )


def _caveats(reading: Reading) -> str:
    card = _caveat_card(reading)
    return f'<div class="reading">\n{card}</div>\n' if card else ""


def _caveat_card(reading: Reading) -> str:
    if not reading.caveats:
        return ""
    caveats = "".join(f"<li>{prose_html(caveat)}</li>" for caveat in reading.caveats)
    return f'<section class="card caveats"><h3>Read with care</h3><ul>{caveats}</ul></section>\n'


def _findings(kind: str, heading: str, findings: Sequence[Finding], nothing: str) -> str:
    entries = "".join(
        f"<dt>{escape(finding.name)}</dt>"
        + "".join(f"<dd>{prose_html(part)}</dd>" for part in finding.parts)
        for finding in findings
    )
    body = f"<dl>{entries}</dl>" if entries else f'<p class="none">{nothing}</p>'
    return f'<section class="card {kind}"><h3>{heading}</h3>{body}</section>\n'


def alarms_html(alarms: Sequence[Warned]) -> str:
    """What training warned of."""
    entries = "".join(
        f"<li><strong>{escape(alarm.run)}: {escape(alarm.name)}</strong> {escape(alarm.when)}."
        f" {prose_html(sentence(alarm.message))}</li>"
        for alarm in alarms
    )
    body = (
        f'<ul class="card alarms">{entries}</ul>'
        if entries
        else '<p class="none">No run raised an alarm.</p>'
    )
    return f'<section aria-labelledby="alarms">\n<h2 id="alarms">Alarms</h2>\n{body}\n</section>'
