"""The report: one HTML page that holds everything and asks the network for nothing."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from etr.files import write_bytes
from etr.prose import prose_html
from etr.report.alarms import by_kind, gather_alarms
from etr.report.chart import Drawing, Skipped, page_spec, page_svg, save_files, script
from etr.report.columns import PAGE_COLUMNS, RUN_COLUMNS, footnotes
from etr.report.figures import FIGURES, draw_figures
from etr.report.reading import NOTHING, headline, read
from etr.report.results import Results
from etr.report.sources import Part, Report, ReportLike, load_report
from etr.report.spec import SECTIONS, Numbers, Section
from etr.report.style import looks, theme_variables
from etr.report.summary import Summary, summarize
from etr.report.wording import TIMES, clipped, counted, fixed, listed, sentence

COMPARISON_TITLE = "Routers compared on the same work"
RUNS_TITLE = "Training runs"
UNDECIDED = "No difference in held-out loss is decided."
LONG = 24
"""Letters of a name from which the table gives names more room."""
PAGES = Path(__file__).parent / "pages"
LAST: Section = "Time and memory"
"""The section of figures that comes after what warns and what is undecided."""


def write_report(
    source: ReportLike,
    path: Path,
    *,
    title: str | None = None,
    figures_dir: Path | None = None,
) -> Path:
    """Write comparisons and runs as one self-contained HTML page.

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
    page = render_page(report, figures, title=title)
    # A text of the results may hold what UTF-8 cannot write (half a surrogate pair).
    write_bytes(path, page.encode("utf-8", errors="replace"))
    if figures_dir is not None:
        for figure in figures:
            if isinstance(figure, Drawing):
                save_files(figure, figures_dir)
    return path


def render_page(report: Report, figures: Sequence[Drawing | Skipped], *, title: str | None) -> str:
    """The page's HTML."""
    results = report.results
    compared = results.is_comparison
    own = (PAGES / "report.js").read_text(encoding="utf-8")
    drawn = [figure for figure in figures if isinstance(figure, Drawing)]
    sections = {
        section: _rows([figure for figure in drawn if figure.section == section])
        for section in SECTIONS
    }
    return (
        _pages()
        .get_template("report.html")
        .render(
            title=title or (COMPARISON_TITLE if compared else RUNS_TITLE),
            verdict=_verdict(results) if compared else None,
            lead=_scope(results) if compared else _runs_lead(results),
            parts=[_part(part) for part in report.parts],
            looks=looks(results.names),
            nothing=NOTHING,
            alarms=by_kind(gather_alarms(results)),
            sections={name: rows for name, rows in sections.items() if rows and name != LAST},
            last=(LAST, sections[LAST]),
            skipped=_told(figures, alone=len(results.names) == 1),
            charts=_charts(drawn),
            script=own,
            hashes=[_hash(text) for text in (own, script())],
        )
    )


def _told(figures: Sequence[Drawing | Skipped], *, alone: bool) -> list[Skipped]:
    """What was not drawn, but for what means nothing on a page of one run."""
    comparisons = {spec.key for spec in FIGURES if spec.compares}
    return [f for f in figures if isinstance(f, Skipped) and not (alone and f.key in comparisons)]


def _rows(figures: Sequence[Drawing]) -> list[tuple[Drawing, bool]]:
    """Figures of a section, each with whether it takes a whole row: no place stays empty."""
    halves = [figure for figure in figures if not figure.wide]
    last = halves[-1] if len(halves) % 2 else None
    # Halves stand together, in the place of the first of them.
    first = figures.index(halves[0]) if halves else 0
    wide = [figure for figure in figures if figure.wide]
    before = sum(figure.wide for figure in figures[:first])
    return [
        (figure, figure.wide or figure is last)
        for figure in (*wide[:before], *halves, *wide[before:])
    ]


def _pages() -> Environment:
    """The templates, in which every text is escaped."""
    pages = Environment(
        loader=FileSystemLoader(PAGES),
        autoescape=True,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    pages.globals["theme"] = theme_variables
    pages.filters |= {
        "json": lambda value, indent=None: json.dumps(
            value, indent=indent, ensure_ascii=False, default=str
        ),
        "prose": prose_html,
        "sentence": sentence,
        "svg": page_svg,
        "data_link": data_link,
        "anchor": lambda text: text.lower().replace(" ", "-"),
        "counted": counted,
    }
    return pages


def data_link(numbers: Numbers) -> str:
    """The numbers of a figure as a link that holds them: columns of CSV, compressed."""
    return f"data:application/gzip;base64,{_packed(numbers.csv(by_columns=True))}"


def _charts(drawn: Sequence[Drawing]) -> str:
    """What makes the page's pictures charts: specifications, and the script that shows them."""
    charts = {figure.key: page_spec(figure) for figure in drawn if figure.html is None}
    held = {"runtime": script(), "charts": charts}
    return _packed(json.dumps(held, ensure_ascii=False, separators=(",", ":")))


def _packed(text: str) -> str:
    """A text as letters that stand anywhere in a page, compressed; the same ones for the same."""
    packed = gzip.compress(text.encode("utf-8", errors="replace"), mtime=0)
    return base64.b64encode(packed).decode()


def _hash(text: str) -> str:
    """What the page's policy calls a script by, so that no other one runs."""
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def _part(part: Part) -> dict[str, Any]:
    """What the page shows of a part beside its figures."""
    compared = part.results.is_comparison
    heading = "Results" if compared else "Runs"
    if part.name:
        heading = f"{heading}: {part.name}" if compared else part.name
    columns, summary = PAGE_COLUMNS if compared else RUN_COLUMNS, summarize(part.results)
    return {
        "name": part.name,
        "results": part.results,
        "heading": heading,
        "columns": columns,
        "summary": summary,
        "long": max(map(len, part.results.names)) > LONG,
        "best": _best(summary) if compared and headline(summary) else None,
        "notes": footnotes(summary, columns),
        "reading": read(part.results),
    }


def _best(summary: Summary) -> str | None:
    """The variant of least held-out loss among those that compare; None where one stands alone."""
    rated = {
        v.name: loss.mean
        for v in summary.variants
        if v.name not in summary.incomparable
        and (loss := v.estimates.get("val_loss"))
        and not loss.missing
    }
    return min(rated, key=lambda name: rated[name]) if len(rated) > 1 else None


def _verdict(results: Results) -> str:
    finding = headline(summarize(results))
    return f"{finding}." if finding else UNDECIDED


def _scope(results: Results) -> str:
    summary = summarize(results)
    seeds = max(len(variant.seeds) for variant in summary.variants)
    steps = summary.baseline.estimates.get("steps")
    length = f", the baseline over {fixed(steps.mean, 0)} steps each" if steps else ""
    return (
        f"{counted(len(summary.variants), 'variant')} {TIMES} {counted(seeds, 'seed')}{length},"
        f" compared with {summary.baseline.name}."
    )


def _runs_lead(results: Results) -> str:
    names = [clipped(name, 40) for name in results.names[:8]]
    more = len(results.names) - len(names)
    told = listed([*names, f"{more} more"] if more else names)
    return (
        f"{counted(len(results.rows), 'run')}: {told}. They need not have done the same work: no"
        " difference between them is judged here."
    )
