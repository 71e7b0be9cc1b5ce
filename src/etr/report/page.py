"""The report: one HTML page that holds everything and asks the network for nothing."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from etr.files import write_bytes
from etr.prose import prose_html
from etr.report.alarms import gather_alarms
from etr.report.figure import Drawing, Skipped, inline_svg, save_files
from etr.report.figures import draw_figures
from etr.report.page_style import STYLE_SHEET
from etr.report.reading import headline
from etr.report.results import Results
from etr.report.sources import Report, ReportLike, load_report
from etr.report.spec import SECTIONS
from etr.report.summary import summarize
from etr.report.tables import alarms_html, part_html
from etr.report.wording import TIMES, clipped, counted, fixed, listed

COMPARISON_TITLE = "Routers compared on the same work"
RUNS_TITLE = "Training runs"
# Styles and pictures are in the page; it runs no script and fetches nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(
    source: ReportLike,
    path: Path,
    *,
    title: str | None = None,
    figures_dir: Path | None = None,
) -> Path:
    """Write comparisons and runs as one self-contained HTML page.

    The numbers behind each figure go to KEY.csv in the folder STEM-data beside the page, which
    links them; without that folder the page lacks nothing else.

    Args:
        source: results.json, its folder, its content or loaded results; the folder of a run; or
            several folders. With content, the rows' `metrics` paths are relative to the folder of
            `path`.
        path: the page to write, whole or not at all.
        title: heading of the page; None for one that says what it is of.
        figures_dir: where to write each figure as SVG and PNG too; nowhere if None.
    Returns:
        `path`.
    Raises:
        FileNotFoundError, ValueError: as `load_report`.
    """
    path = Path(path)
    root = path.parent if isinstance(source, Mapping) else None
    report = load_report(source, metrics_root=root)
    figures = draw_figures(report)
    data = path.with_name(f"{path.stem}-data")
    page = render_page(report, figures, title=title, data=data.name)
    _write_numbers(figures, data)
    # A text of the results may hold what UTF-8 cannot write (half a surrogate pair).
    write_bytes(path, page.encode("utf-8", errors="replace"))
    if figures_dir is not None:
        for figure in figures:
            if isinstance(figure, Drawing):
                save_files(figure, figures_dir)
    return path


def _write_numbers(figures: Sequence[Drawing | Skipped], folder: Path) -> None:
    for figure in figures:
        path = folder / f"{figure.key}.csv"
        if isinstance(figure, Drawing):
            write_bytes(path, figure.numbers.csv().encode("utf-8", errors="replace"))
        else:
            path.unlink(missing_ok=True)  # of an earlier report, which had the figure


def render_page(
    report: Report, figures: Sequence[Drawing | Skipped], *, title: str | None, data: str
) -> str:
    """The page's HTML; `data` is the folder of numbers beside it."""
    results = report.results
    title = title or (COMPARISON_TITLE if results.is_comparison else RUNS_TITLE)
    parts = "\n".join(part_html(part, place, results) for place, part in enumerate(report.parts))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE_SHEET}</style>\n</head>\n<body>\n"
        f"{_header(report, title)}\n<main>\n"
        f"{parts}\n{alarms_html(gather_alarms(results))}\n{_figures(figures, data)}\n"
        f"{_reproduce(report)}\n</main>\n"
        "<footer>Every number and sentence on this page is computed from the runs' files:"
        " results.json, metrics.jsonl and trace.parquet. The links to numbers lead into the folder"
        f" {escape(data)} beside the page; all else is in the page.</footer>\n</body>\n</html>\n"
    )


def _header(report: Report, title: str) -> str:
    results = report.results
    lead = _comparison_lead(results) if results.is_comparison else _runs_lead(results)
    return (
        '<header>\n<p class="eyebrow">Mixture of experts</p>\n'
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n</header>'
    )


def _comparison_lead(results: Results) -> str:
    summary = summarize(results)
    seeds = max(len(variant.seeds) for variant in summary.variants)
    steps = summary.baseline.estimates.get("steps")
    length = f", the baseline over {fixed(steps.mean, 0)} steps each" if steps else ""
    finding = headline(summary)
    return (
        f"{counted(len(summary.variants), 'variant')} {TIMES} {counted(seeds, 'seed')}{length},"
        f" compared with {summary.baseline.name}. "
        + (f"{finding}." if finding else "No difference in held-out loss is decided.")
    )


def _runs_lead(results: Results) -> str:
    names = [clipped(name, 40) for name in results.names[:8]]
    more = len(results.names) - len(names)
    told = listed([*names, f"{more} more"] if more else names)
    return (
        f"{counted(len(results.rows), 'run')}: {told}. They need not have done the same work: no"
        " difference between them is judged here."
    )


def _figures(figures: Sequence[Drawing | Skipped], data: str) -> str:
    drawn = {section: [f for f in figures if f.section == section] for section in SECTIONS}
    ids = {section: section.lower().replace(" ", "-") for section in SECTIONS}
    links = "".join(f'<a href="#{ids[section]}">{section}</a>' for section in SECTIONS)
    blocks = "\n".join(
        f'<section aria-labelledby="{ids[section]}">\n<h3 class="group" id="{ids[section]}">'
        f'{section}</h3>\n<div class="figures">\n'
        + "\n".join(_figure(figure, data) for figure in drawn[section])
        + "\n</div>\n</section>"
        for section in SECTIONS
    )
    return (
        '<section aria-labelledby="figures">\n<h2 id="figures">Figures</h2>\n'
        f'<nav aria-label="Figures">{links}</nav>\n{blocks}\n</section>'
    )


def _figure(figure: Drawing | Skipped, data: str) -> str:
    head = f'<h4 id="{figure.key}-title">{escape(figure.title)}</h4>'
    if isinstance(figure, Skipped):
        reason = f"<p>Not drawn: {prose_html(figure.reason)}.</p>"
        return f'<div class="card skipped" id="{figure.key}">{head}{reason}</div>'
    wide = ' class="card wide"' if figure.html else ' class="card"'
    link = f'<a href="{quote(data)}/{figure.key}.csv" download>Numbers (CSV)</a>'
    return (
        f'<figure{wide} id="{figure.key}">{head}\n{figure.html or inline_svg(figure)}\n'
        f"<figcaption>{prose_html(figure.caption)} {link}</figcaption></figure>"
    )


def _reproduce(report: Report) -> str:
    blocks = "\n".join(_made(part.results, part.name) for part in report.parts)
    return (
        '<section aria-labelledby="reproduce">\n<h2 id="reproduce">How to reproduce</h2>\n'
        f"{blocks}\n</section>"
    )


def _made(results: Results, name: str) -> str:
    command = results.command or "not recorded"
    facts = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(_flat(value))}</dd>"
        for key, value in results.environment.items()
    )
    config = escape(json.dumps(results.config, indent=2, ensure_ascii=False, default=str))
    return (
        (f"<h3>{escape(name)}</h3>\n" if name else "")
        + f'<div class="card"><pre tabindex="0"><code>{escape(command)}</code></pre></div>\n'
        + (f'<dl class="facts">{facts}</dl>\n' if facts else "")
        + '<details class="card"><summary>Full configuration</summary>'
        f'<pre tabindex="0"><code>{config}</code></pre></details>'
    )


def _flat(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
