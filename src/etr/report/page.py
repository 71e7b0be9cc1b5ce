"""The report: one HTML page that holds everything and asks the network for nothing."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from etr.report.columns import COLUMNS, Column, footnotes
from etr.report.figure import Drawing, Skipped, inline_svg, save_files, write_atomically
from etr.report.figures import draw_figures
from etr.report.page_style import STYLE_SHEET
from etr.report.reading import NOTHING, Finding, Reading, headline, read
from etr.report.results import Results, ResultsLike, load_results
from etr.report.style import variant_style
from etr.report.summary import Summary, VariantSummary, summarize
from etr.report.wording import TIMES, counted, fixed

DEFAULT_TITLE = "Routers compared on the same work"


def write_report(
    results: ResultsLike,
    path: Path,
    *,
    title: str = DEFAULT_TITLE,
    figures_dir: Path | None = None,
) -> Path:
    """Write a comparison as one self-contained HTML page.

    Args:
        results: results.json, its folder, its content or loaded results; with content, the rows'
            `metrics` paths are relative to the folder of `path`.
        path: the page to write, whole or not at all.
        title: heading of the page.
        figures_dir: where to write each figure as SVG and PNG too; nowhere if None.
    Returns:
        `path`.
    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    path = Path(path)
    root = path.parent if isinstance(results, Mapping) else None
    loaded = load_results(results, metrics_root=root)
    figures = draw_figures(loaded)
    page = render_page(loaded, figures, title=title)
    # A text of the results may hold what UTF-8 cannot write (half a surrogate pair).
    write_atomically(path, page.encode("utf-8", errors="replace"))
    if figures_dir is not None:
        for figure in figures:
            if isinstance(figure, Drawing):
                save_files(figure, figures_dir)
    return path


def render_page(results: Results, figures: Sequence[Drawing | Skipped], *, title: str) -> str:
    """The page's HTML."""
    summary = summarize(results)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n"
        f"{_header(results, summary, title)}\n<main>\n"
        f"{_table(summary)}\n{_reading(read(results))}\n{_figures(figures)}\n"
        f"{_reproduce(results)}\n</main>\n"
        "<footer>Every number and sentence on this page is computed from results.json and the"
        " metrics.jsonl of its runs.</footer>\n</body>\n</html>\n"
    )


def _header(results: Results, summary: Summary, title: str) -> str:
    seeds = max(len(variant.seeds) for variant in summary.variants)
    steps = summary.baseline.estimates.get("steps")
    length = f", the baseline over {fixed(steps.mean, 0)} steps each" if steps else ""
    finding = headline(summary)
    lead = (
        f"{counted(len(summary.variants), 'variant')} {TIMES} {counted(seeds, 'seed')}{length},"
        f" compared with {summary.baseline.name}. "
        + (f"{finding}." if finding else "No difference in held-out loss is decided.")
    )
    return (
        '<header>\n<p class="eyebrow">Mixture of experts, compared</p>\n'
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n</header>'
    )


def _table(summary: Summary) -> str:
    heads = "".join(
        f'<th scope="col"{_numeric(column)}>{escape(column.header)}'
        f"<small>{escape(column.unit)}</small></th>"
        for column in COLUMNS
    )
    rows = "\n".join(_table_row(i, variant) for i, variant in enumerate(summary.variants))
    notes = "".join(f"<li>{escape(note)}</li>" for note in footnotes(summary))
    return (
        '<section aria-labelledby="results">\n<h2 id="results">Results</h2>\n'
        '<div class="card scroll" tabindex="0" role="region" aria-labelledby="results">\n'
        f'<table class="results">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        f'</table>\n</div>\n<ul class="notes">{notes}</ul>\n</section>'
    )


def _numeric(column: Column) -> str:
    return ' class="num"' if column.numeric else ""


def _table_row(index: int, variant: VariantSummary) -> str:
    first, *others = COLUMNS
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


def _reading(reading: Reading) -> str:
    caveats = "".join(f"<li>{escape(caveat)}</li>" for caveat in reading.caveats)
    return (
        '<section aria-labelledby="reading">\n<h2 id="reading">What the numbers say</h2>\n'
        '<div class="reading">\n'
        + _findings("gains", "What it gains", reading.gains, NOTHING)
        + _findings("losses", "Where it loses", reading.losses, NOTHING)
        + _findings("open", "Undecided", reading.undecided, "Every comparable loss is decided.")
        + (
            f'<section class="card caveats"><h3>Read with care</h3><ul>{caveats}</ul></section>\n'
            if caveats
            else ""
        )
        + "</div>\n</section>"
    )


def _findings(kind: str, heading: str, findings: Sequence[Finding], nothing: str) -> str:
    entries = "".join(
        f"<dt>{escape(finding.name)}</dt>"
        + "".join(f"<dd>{escape(part)}</dd>" for part in finding.parts)
        for finding in findings
    )
    body = f"<dl>{entries}</dl>" if entries else f'<p class="none">{nothing}</p>'
    return f'<section class="card {kind}"><h3>{heading}</h3>{body}</section>\n'


def _figures(figures: Sequence[Drawing | Skipped]) -> str:
    cards = "\n".join(_figure(figure) for figure in figures)
    return (
        '<section aria-labelledby="figures">\n<h2 id="figures">Figures</h2>\n'
        f'<div class="figures">\n{cards}\n</div>\n</section>'
    )


def _figure(figure: Drawing | Skipped) -> str:
    head = f'<h3 id="{figure.key}-title">{escape(figure.title)}</h3>'
    if isinstance(figure, Skipped):
        reason = f"<p>Not drawn: {escape(figure.reason)}.</p>"
        return f'<div class="card skipped">{head}{reason}</div>'
    return (
        f'<figure class="card">{head}\n{inline_svg(figure)}\n'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _reproduce(results: Results) -> str:
    command = results.command or "not recorded"
    facts = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(_flat(value))}</dd>"
        for key, value in results.environment.items()
    )
    config = escape(json.dumps(results.config, indent=2, ensure_ascii=False, default=str))
    return (
        '<section aria-labelledby="reproduce">\n<h2 id="reproduce">How to reproduce</h2>\n'
        f'<div class="card"><pre><code>{escape(command)}</code></pre></div>\n'
        + (f'<dl class="facts">{facts}</dl>\n' if facts else "")
        + '<details class="card"><summary>Full configuration</summary>'
        f"<pre><code>{config}</code></pre></details>\n</section>"
    )


def _flat(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
