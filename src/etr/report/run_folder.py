"""One training run on its own: its folder to a row, as a comparison would have it."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from etr.files import read_json
from etr.report.metrics import Metrics
from etr.report.observations import Array, label
from etr.report.results import (
    VALUES,
    Notes,
    Row,
    find_metrics,
    find_trace,
    parse_row,
)

METRICS = "metrics.jsonl"
LAST_STEPS = 100
"""Steps at the end of training over which shares are averaged."""


def load_run(folder: Path, name: str, notes: Notes) -> Row:
    """Load a run's folder: what a comparison noted of it, else what its metrics and config say.

    Args:
        folder: holds metrics.jsonl.
        name: what the report calls the run.
        notes: receives what is missing or damaged.
    """
    stored = _read(folder / "row.json", name, notes).get("row")
    if isinstance(stored, Mapping):
        try:
            raw = {**stored, "name": name, "metrics": METRICS}
            return parse_row(raw, f"{folder / 'row.json'}: row", folder, notes)
        except ValueError as error:
            notes.setdefault(f"its row is left out, {error}.", []).append(name)
    return _from_metrics(folder, name, notes)


def _from_metrics(folder: Path, name: str, notes: Notes) -> Row:
    config = _read(folder / "config.json", name, notes)
    routing = _inside(_inside(config, "model"), "routing")
    seed = config.get("seed")
    metrics = find_metrics(folder / METRICS, METRICS, name, notes)
    asked = routing.get("eval_selection")
    selections = {evaluation.selection for evaluation in metrics.evaluations} if metrics else set()
    selection = asked if isinstance(asked, str) and asked in selections else "dropless"
    return Row(
        name=name,
        router=_named(routing.get("router")),
        capacity=_named(routing.get("capacity")),
        seed=seed if isinstance(seed, int) else 0,
        selection=selection,
        causal=None,
        bound=metrics is not None and any(found.bound for found in metrics.evaluations),
        values={**dict.fromkeys(VALUES), **(_values(metrics, selection) if metrics else {})},
        val_loss_by_domain={},
        histogram=None,
        metrics=metrics,
        trace=find_trace(folder),
    )


def _values(metrics: Metrics, selection: str) -> dict[str, float | None]:
    """The figures of merit that the metrics hold."""
    served = [e for e in metrics.evaluations if e.selection == selection]
    dropless = [e for e in metrics.evaluations if e.selection == "dropless"]
    flops = metrics.train["expert_flops"]
    return {
        "steps": float(metrics.step[-1]) if metrics.step.size else None,
        "tokens": _last(metrics.train["tokens"]),
        "val_loss": served[-1].val_loss if served else None,
        "val_loss_dropless": dropless[-1].val_loss if dropless else None,
        "kept_fraction_eval": served[-1].kept_fraction if served else None,
        **{
            key: _mean(metrics.train[key][-LAST_STEPS:])
            for key in ("kept_fraction", "drop_rate", "max_violation")
        },
        "step_time_seconds_median": _median(metrics.train["step_time_seconds"]),
        "expert_flops_per_step": _mean(np.diff(flops, prepend=0.0)),
        "expert_flops_total": _last(flops),
    }


def _finite(values: Array) -> list[float]:
    return [float(value) for value in values if np.isfinite(value)]


def _last(values: Array) -> float | None:
    found = _finite(values)
    return found[-1] if found else None


def _mean(values: Array) -> float | None:
    found = _finite(values)
    return statistics.fmean(found) if found else None


def _median(values: Array) -> float | None:
    found = _finite(values)
    return statistics.median(found) if found else None


def _read(path: Path, name: str, notes: Notes) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except ValueError:
        notes.setdefault(f"{path.name} is not complete JSON and left out.", []).append(name)
        return {}
    return content if isinstance(content, Mapping) else {}


def _inside(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _named(value: Any) -> str:
    """A router or policy is a name, or its options with the name among them."""
    found = value.get("name") if isinstance(value, Mapping) else value
    return label(found) if found else "default"
