"""Read what a comparison wrote: results.json and, beside each row, its metrics.jsonl.

Numbers that are missing, null or not finite become None (in curves: NaN), so that everything
after this file meets one kind of absence only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etr.files import read_json
from etr.report.histogram import Histogram, parse_histogram
from etr.report.metrics import Metrics, load_metrics
from etr.report.observations import label, number

FORMAT = 1
TRACE = "trace.parquet"
# The numeric fields of a row; every one may be null.
VALUES = (
    "steps",
    "tokens",
    "val_loss",
    "val_loss_dropless",
    "kept_fraction",
    "kept_fraction_eval",
    "drop_rate",
    "num_tokens_per_expert_mean",
    "max_violation",
    "step_time_seconds_median",
    "step_time_ratio_median",
    "expert_flops_per_step",
    "expert_flops_total",
    "parameters",
    "active_parameters",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: one variant with one seed."""

    name: str
    """The variant; appears once per seed."""
    router: str
    """Name of the router."""
    capacity: str
    """Capacity policy, in words."""
    seed: int
    """Seed of the run; rows of different variants are paired by it."""
    selection: str
    """How experts kept tokens for `val_loss`: `threshold` or `dropless`."""
    causal: bool | None
    """False where later tokens may change earlier ones; such rows compare only with each other.
    None where the run does not say."""
    bound: bool = False
    """Whether losses are upper bounds of the text's nats, to compare with other bounds alone."""
    values: Mapping[str, float | None]
    """The numbers named in `VALUES`; None where the run has none."""
    val_loss_by_domain: Mapping[str, float | None]
    """Held-out loss of each domain, nats per token."""
    histogram: Histogram | None
    """Score histogram, if the router has scores."""
    metrics: Metrics | None
    """Curves of the run, if its metrics file was readable."""
    trace: Path | None = None
    """Where the run's routed tokens are, if it recorded any."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """Runs, mostly a whole comparison. The first row's name is then the baseline."""

    command: str
    """The command that made it."""
    config: Mapping[str, Any]
    """The full configuration."""
    environment: Mapping[str, Any]
    """Versions, machine and date."""
    rows: tuple[Row, ...]
    """All runs, in the order of the file; never empty."""
    notes: tuple[str, ...]
    """What was missing or damaged in the metrics files, one sentence each."""
    is_comparison: bool = True
    """Whether all rows did the same work, so that a difference between them means something."""

    @property
    def names(self) -> tuple[str, ...]:
        """Variant names in order of first appearance."""
        return tuple(dict.fromkeys(row.name for row in self.rows))

    def of(self, name: str) -> tuple[Row, ...]:
        """The rows of one variant, one per seed."""
        return tuple(row for row in self.rows if row.name == name)


Notes = dict[str, list[str]]
"""What was missing or damaged, each with the runs that it is about."""
ResultsLike = Results | Mapping[str, Any] | Path | str


def load_results(source: ResultsLike, *, metrics_root: Path | None = None) -> Results:
    """Load and check a comparison's results.

    Args:
        source: path of results.json or of the folder that holds it; or its content as a mapping;
            or a `Results`, returned as it is.
        metrics_root: folder that the rows' `metrics` paths are relative to; by default the
            folder of the file, or the current one when `source` is a mapping.
    Returns:
        The checked results. A metrics file that is absent or damaged costs its curves only,
        and is named in `notes`.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut, foreign, of another format, or a field is malformed.
    """
    if isinstance(source, Results):
        return source
    if isinstance(source, Mapping):
        return _parse(source, "results", metrics_root or Path())
    path = Path(source)
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"results: {path} does not exist; give the results.json that `etr compare` wrote"
        )
    return _parse(_read_json(path), str(path), metrics_root or path.parent)


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; give the results.json that `etr compare` wrote") from error


def _parse(content: Any, where: str, metrics_root: Path) -> Results:
    if not isinstance(content, Mapping) or "format" not in content or "rows" not in content:
        raise ValueError(
            f"{where} has no `format` and `rows`; expected the results.json of `etr compare`"
        )
    if content["format"] != FORMAT or isinstance(content["format"], bool):
        raise ValueError(
            f"{where}: format {content['format']!r} is unknown; this version reads format {FORMAT}"
        )
    raw_rows = content["rows"]
    if not isinstance(raw_rows, Sequence) or isinstance(raw_rows, str) or not raw_rows:
        raise ValueError(f"{where}: rows must be a list with at least one run, got {raw_rows!r}")
    notes: Notes = {}
    rows = tuple(
        parse_row(raw, f"{where}: rows[{index}]", metrics_root, notes)
        for index, raw in enumerate(raw_rows)
    )
    _check_variants(rows, where)
    return Results(
        command=str(content.get("command") or ""),
        config=_mapping(content.get("config"), f"{where}: config"),
        environment=_mapping(content.get("environment"), f"{where}: environment"),
        rows=rows,
        notes=written_notes(notes),
    )


def written_notes(notes: Notes) -> tuple[str, ...]:
    """One sentence per note, with the runs that it is about."""
    return tuple(f"{together(runs)}: {note}" for note, runs in notes.items())


def together(runs: Sequence[str]) -> str:
    """The first runs by name and the others by number."""
    shown = "; ".join(runs[:3])
    return shown if len(runs) <= 3 else f"{shown} and {len(runs) - 3} more"


def parse_row(raw: Any, where: str, metrics_root: Path, notes: Notes) -> Row:
    """One run from what `etr compare` wrote about it.

    Args:
        raw: the row.
        where: names the row in errors.
        metrics_root: folder that its `metrics` path is relative to.
        notes: receives what is missing or damaged in the metrics.
    Raises:
        ValueError: a field is malformed.
    """
    raw = _mapping(raw, where)
    for field in ("name", "router", "capacity", "seed", "selection", "causal", "val_loss"):
        if field not in raw:
            raise ValueError(f"{where} has no {field!r}")
    name, seed, selection = raw["name"], raw["seed"], raw["selection"]
    if not isinstance(name, str) or not label(name):
        raise ValueError(f"{where}: name must be a text that is not empty, got {name!r}")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"{where}: seed must be an integer, got {seed!r}")
    if not isinstance(selection, str) or not label(selection):
        raise ValueError(f"{where}: selection must be a text that is not empty, got {selection!r}")
    if not isinstance(raw["causal"], bool):
        raise ValueError(f"{where}: causal must be true or false, got {raw['causal']!r}")
    path = metrics_root / str(raw["metrics"]) if raw.get("metrics") else None
    by_domain = _mapping(raw.get("val_loss_by_domain"), f"{where}: val_loss_by_domain")
    return Row(
        name=label(name),
        router=label(raw["router"]),
        capacity="none" if raw["capacity"] is None else label(raw["capacity"]),
        seed=seed,
        selection=label(selection),
        causal=raw["causal"],
        bound=raw.get("bound") is True,
        values={field: number(raw.get(field), f"{where}: {field}") for field in VALUES},
        val_loss_by_domain={
            label(domain): number(loss, f"{where}: val_loss_by_domain[{domain!r}]")
            for domain, loss in by_domain.items()
        },
        histogram=_histogram(raw.get("affinity_histogram"), f"{where}: affinity_histogram"),
        metrics=find_metrics(path, str(raw["metrics"]), f"{label(name)}, seed {seed}", notes)
        if path
        else None,
        trace=find_trace(path.parent) if path else None,
    )


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object, got {type(value).__name__}")
    return value


def _histogram(raw: Any, where: str) -> Histogram | None:
    if raw is None:
        return None
    return parse_histogram(_mapping(raw, where), where)


def find_metrics(path: Path, shown: str, run: str, notes: Notes) -> Metrics | None:
    """A run's curves; a report without one run's curves is better than none, so say and go on."""
    try:
        metrics = load_metrics(path)
    except FileNotFoundError:
        notes.setdefault(f"no curves, {shown} does not exist.", []).append(run)
        return None
    except ValueError as error:
        notes.setdefault(f"no curves, {error}.", []).append(run)
        return None
    for note in metrics.notes:
        notes.setdefault(note, []).append(run)
    return metrics


def find_trace(folder: Path) -> Path | None:
    """The routed tokens that lie beside a run's metrics."""
    path = folder / TRACE
    return path if path.is_file() else None


def _check_variants(rows: Sequence[Row], where: str) -> None:
    first: dict[str, Row] = {}
    seen: set[tuple[str, int]] = set()
    for row in rows:
        if (row.name, row.seed) in seen:
            raise ValueError(
                f"{where}: variant {row.name!r} has seed {row.seed} twice; give each run its own"
                " name or seed"
            )
        seen.add((row.name, row.seed))
        other = first.setdefault(row.name, row)
        for field in ("router", "capacity", "selection", "causal", "bound"):
            if getattr(row, field) != getattr(other, field):
                raise ValueError(
                    f"{where}: variant {row.name!r} has {field} {getattr(other, field)!r} and"
                    f" {getattr(row, field)!r}; one name must mean one configuration"
                )
