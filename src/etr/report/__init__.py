"""Runs and comparisons as tables, figures, Markdown and one self-contained HTML page."""

from etr.report.figures import FIGURES, draw_figures, write_figures
from etr.report.markdown import results_markdown
from etr.report.metrics import Metrics, load_metrics
from etr.report.page import write_report
from etr.report.reading import Reading, read
from etr.report.results import Results, Row, load_results
from etr.report.sources import Part, Report, load_report
from etr.report.summary import Summary, summarize
from etr.report.table import markdown_table, terminal_table

__all__ = [
    "FIGURES",
    "Metrics",
    "Part",
    "Reading",
    "Report",
    "Results",
    "Row",
    "Summary",
    "draw_figures",
    "load_metrics",
    "load_report",
    "load_results",
    "markdown_table",
    "read",
    "results_markdown",
    "summarize",
    "terminal_table",
    "write_figures",
    "write_report",
]
