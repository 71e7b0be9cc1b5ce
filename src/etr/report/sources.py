"""Folders of runs and of comparisons to one report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from etr.report.observations import label
from etr.report.results import Notes, Results, ResultsLike, Row, load_results, written_notes
from etr.report.run_folder import METRICS, load_run


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that share a table: one comparison, or all runs that belong to none."""

    name: str
    """Its folder, for its heading; empty where it is the only one."""
    results: Results
    """Its rows; names are different in every part."""


@dataclass(frozen=True)
class Report:
    """Everything that one page shows."""

    parts: tuple[Part, ...]
    """Comparisons in the order given, then the single runs together; never empty."""

    @cached_property
    def results(self) -> Results:
        """All rows together: what the figures are drawn from."""
        if len(self.parts) == 1:
            return self.parts[0].results
        return Results(
            command="",
            config={},
            environment={},
            rows=tuple(row for part in self.parts for row in part.results.rows),
            notes=tuple(note for part in self.parts for note in part.results.notes),
            is_comparison=False,
        )


ReportLike = Report | ResultsLike | Sequence[Path | str]


def load_report(source: ReportLike, *, metrics_root: Path | None = None) -> Report:
    """Load what a page shows.

    Args:
        source: what `load_results` takes; or the folder of a run or of several runs; or a list of
            such folders and of comparisons.
        metrics_root: as in `load_results`, for content that is in memory.
    Raises:
        FileNotFoundError: a folder holds neither a comparison nor a run.
        ValueError: as `load_results`; or there is no folder at all.
    """
    if isinstance(source, Report):
        return source
    if isinstance(source, Results | Mapping):
        return Report((Part(name="", results=load_results(source, metrics_root=metrics_root)),))
    paths = [Path(source)] if isinstance(source, str | Path) else [Path(path) for path in source]
    if not paths:
        raise ValueError("runs is empty; name at least one folder of a run or a comparison")
    return _load_paths(list(dict.fromkeys(paths)))


def _load_paths(paths: Sequence[Path]) -> Report:
    comparisons: list[tuple[Path, Results]] = []
    folders: list[Path] = []
    for path in paths:
        if path.is_file() or (path / "results.json").is_file():
            folder = path.parent if path.is_file() else path
            comparisons.append((folder, load_results(path)))
        else:
            folders += _run_folders(path)
    names = _short_names([folder for folder, _ in comparisons])
    parts = [
        Part(name=name, results=results)
        for name, (_, results) in zip(names, comparisons, strict=True)
    ]
    if folders:
        parts.append(Part(name="Single runs", results=_runs(folders)))
    if len(parts) == 1:
        parts = [replace(parts[0], name="")]
    return Report(tuple(_distinct(parts)))


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' last names; whole paths where two of those are equal."""
    names = [label(folder.resolve().name) for folder in folders]
    return names if len(set(names)) == len(names) else [label(folder) for folder in folders]


def _run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run's, else the runs inside: a comparison that is not done."""
    if (path / METRICS).is_file():
        return [path]
    inside = sorted(found.parent for found in path.glob(f"*/{METRICS}"))
    if inside:
        return inside
    raise FileNotFoundError(
        f"run: {path} "
        + (f"has neither results.json nor {METRICS}" if path.is_dir() else "does not exist")
        + "; give the folder of a run, or of what `etr compare` wrote"
    )


def _runs(folders: Sequence[Path]) -> Results:
    notes: Notes = {}
    names = _short_names(folders)
    rows = [load_run(folder, name, notes) for folder, name in zip(folders, names, strict=True)]
    return Results(
        command="",
        config={},
        environment={},
        rows=tuple(rows),
        notes=written_notes(notes),
        is_comparison=False,
    )


def _distinct(parts: Sequence[Part]) -> list[Part]:
    """Put the folder before the names that another part has too."""
    owners: dict[str, int] = {}
    for part in parts:
        for name in part.results.names:
            owners[name] = owners.get(name, 0) + 1

    def renamed(row: Row, part: Part) -> Row:
        return row if owners[row.name] == 1 else replace(row, name=f"{part.name}/{row.name}")

    return [
        replace(
            part,
            results=replace(
                part.results, rows=tuple(renamed(row, part) for row in part.results.rows)
            ),
        )
        for part in parts
    ]
