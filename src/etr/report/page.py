"""The report: one HTML page that holds everything and asks the network for nothing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from etr.files import write_bytes
from etr.prose import prose_html
from etr.report.alarms import gather_alarms
from etr.report.columns import COLUMNS, RUN_COLUMNS, footnotes
from etr.report.figure import Drawing, Skipped, inline_svg, save_files
from etr.report.figures import draw_figures
from etr.report.reading import NOTHING, headline, read
from etr.report.results import Results
from etr.report.sources import Part, Report, ReportLike, load_report
from etr.report.spec import SECTIONS
from etr.report.style import theme_variables, variant_style
from etr.report.summary import summarize
from etr.report.wording import TIMES, clipped, counted, fixed, listed, sentence

COMPARISON_TITLE = "Routers compared on the same work"
RUNS_TITLE = "Training runs"


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
    compared = results.is_comparison
    return (
        _pages()
        .get_template("report.html")
        .render(
            title=title or (COMPARISON_TITLE if compared else RUNS_TITLE),
            lead=_comparison_lead(results) if compared else _runs_lead(results),
            parts=[_part(part) for part in report.parts],
            looks={name: variant_style(place) for place, name in enumerate(results.names)},
            nothing=NOTHING,
            alarms=gather_alarms(results),
            sections=SECTIONS,
            figures=figures,
            data=data,
        )
    )


def _pages() -> Environment:
    """The templates, in which every text is escaped."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"),
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
        "svg": inline_svg,
    }
    return pages


def _part(part: Part) -> dict[str, Any]:
    """What the page shows of a part above its figures."""
    compared = part.results.is_comparison
    heading = "Results" if compared else "Runs"
    if part.name:
        heading = f"{heading}: {part.name}" if compared else part.name
    columns, summary = COLUMNS if compared else RUN_COLUMNS, summarize(part.results)
    return {
        "name": part.name,
        "results": part.results,
        "heading": heading,
        "columns": columns,
        "summary": summary,
        "notes": footnotes(summary, columns),
        "reading": read(part.results),
    }


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
