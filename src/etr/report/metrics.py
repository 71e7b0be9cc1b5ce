"""Read one run's metrics.jsonl into columns: one array per quantity, one entry per logged step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etr.files import JsonLine, json_lines
from etr.report.observations import (
    Array,
    Diagnostics,
    Evaluation,
    LoggedAlarm,
    Profile,
    label,
    number,
    parse_alarm,
    parse_diagnostics,
    parse_evaluation,
    parse_profile,
)
from etr.report.wording import clipped, counted, listed

Steps = NDArray[np.int64]

# The curves that the report draws.
TRAIN_FIELDS = (
    "tokens",
    "expert_flops",
    "loss",
    "step_time_seconds",
    "kept_fraction",
    "kept_per_choice",
    "drop_rate",
    "tokens_without_expert",
    "capacity_factor",
    "max_violation",
    "memory_bytes",
    "bytes_within_node",
    "bytes_between_nodes",
)
# The curves of each layer.
LAYER_FIELDS = ("capacity", "capacity_lower_bound", "kept_affinity_mass")
# What a line may hold besides; any other key but one of `_LOSSES` is named in the page.
_COMMON = {"kind", "step", "tokens", "expert_flops", "elapsed_seconds", "bound"}
_KNOWN = {
    "train": {
        *_COMMON,
        *TRAIN_FIELDS,
        *("tokens_per_second", "losses", "grad_norm", "learning_rate", "capacity_mean", "layers"),
        "bytes_between_nodes_padded",
    },
    "eval": {
        *_COMMON,
        *("selection", "val_loss", "val_loss_by_domain", "kept_fraction_eval", "kept_per_choice"),
    },
    "diagnostics": {*_COMMON, "domains", "layers", "token_correlation", "token_expert"},
    "profile": {
        *_COMMON,
        *("computation_seconds", "communication_seconds", "overlapped_seconds", "idle_seconds"),
        "operators",
    },
    "alarm": {*_COMMON, "name", "layer", "message"},
}
_LOSSES = "router_loss_"
"""Begins the keys of router losses, which `losses` holds too, by name."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The curves of one run, steps ascending, each step once."""

    step: Steps
    """Optimizer step, [S]."""
    train: Mapping[str, Array]
    """The quantities named in `TRAIN_FIELDS`, each [S], NaN where a line has none."""
    layers: Mapping[str, Array]
    """The quantities named in `LAYER_FIELDS`, each [S, layers], NaN where a line has none; empty
    where lines differ in their number of layers."""
    choices: Array | None
    """Choices per expert before dropping, [S, layers, experts]; None where not all lines agree."""
    kept: Array | None
    """Tokens that each expert kept, as `choices`."""
    losses: tuple[str, ...]
    """Router losses that were ever other than 0."""
    evaluations: tuple[Evaluation, ...]
    """Evaluations, steps ascending."""
    diagnostics: tuple[Diagnostics, ...]
    """Diagnostics, steps ascending."""
    profiles: tuple[Profile, ...]
    """Profiles, steps ascending."""
    alarms: tuple[LoggedAlarm, ...]
    """Alarms in the order of the file."""
    notes: tuple[str, ...]
    """What was damaged, unknown or short, one sentence each."""


def load_metrics(path: Path) -> Metrics:
    """Load one run's metrics.jsonl.

    A line that is cut, damaged or malformed is left out and noted; where a resumed run wrote a
    step again, the later line counts.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"metrics: {path} does not exist")
    found = json_lines(path.read_bytes())
    lines: list[Mapping[str, Any]] = []
    left_out: list[str] = []
    by_kind: dict[str, dict[tuple[Any, ...], Any]] = {kind: {} for kind in _KNOWN}
    for line in found:
        if line.row is None:
            if line.ended or line is not found[-1]:
                left_out.append(f"line {line.number} is not a JSON object")
            continue
        lines.append(line.row)
        kind = line.row.get("kind")
        if not isinstance(kind, str) or kind not in _KNOWN:
            continue
        try:
            key, value = _parsed(kind, line.row, f"line {line.number}")
            by_kind[kind][key] = value
        except ValueError as error:
            left_out.append(str(error))
    in_order = {kind: [found[key] for key in sorted(found)] for kind, found in by_kind.items()}
    rows = in_order["train"]
    return Metrics(
        step=np.array([step for (step,) in sorted(by_kind["train"])], dtype=np.int64),
        train={
            field: np.array([row[field] for row in rows], dtype=np.float64)
            for field in TRAIN_FIELDS
        },
        layers=_layer_curves([row["layers"] for row in rows]),
        choices=_counts([row["layers"] for row in rows], "num_choices_per_expert"),
        kept=_counts([row["layers"] for row in rows], "num_tokens_per_expert"),
        losses=tuple(dict.fromkeys(name for row in rows for name in row["losses"])),
        evaluations=tuple(in_order["eval"]),
        diagnostics=tuple(in_order["diagnostics"]),
        profiles=tuple(in_order["profile"]),
        alarms=tuple(by_kind["alarm"].values()),
        notes=(
            *_damage(path.name, found, left_out),
            *_unknown(lines, path.name),
            *_shortness(len(rows)),
        ),
    )


def _parsed(kind: str, row: Mapping[str, Any], where: str) -> tuple[tuple[Any, ...], Any]:
    """What a line of a known kind holds, and by what a later line of it takes its place.

    Raises:
        ValueError: a field is malformed.
    """
    step = _step(row, where)
    match kind:
        case "train":
            return (step,), _train_values(row, where)
        case "eval":
            evaluation = parse_evaluation(row, step, where)
            return (step, evaluation.selection), evaluation
        case "diagnostics":
            return (step,), parse_diagnostics(row, step)
        case "profile":
            return (step,), parse_profile(row, step)
    alarm = parse_alarm(row, step)
    return (step, alarm.name, str(alarm.layer)), alarm


def _damage(name: str, lines: Sequence[JsonLine], left_out: Sequence[str]) -> list[str]:
    """What was left out of the file of this name."""
    notes = []
    if left_out:
        more = f" and {len(left_out) - 6} more" if len(left_out) > 6 else ""
        words = clipped(label(listed(left_out[:6])), 600)
        notes.append(f"{name} has {counted(len(left_out), 'line')} left out: {words}{more}.")
    if lines and lines[-1].row is None and not lines[-1].ended:
        notes.append(f"the last line of {name} (line {lines[-1].number}) is cut and left out.")
    return notes


def _step(line: Mapping[str, Any], where: str) -> int:
    step = line.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 1 << 63:
        raise ValueError(f"{where}: step must be an integer of at least 0, got {step!r}")
    return step


def _train_values(line: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    layers, losses = line.get("layers"), line.get("losses")
    return {
        **{field: number(line.get(field), f"{where}: {field}") for field in TRAIN_FIELDS},
        "layers": layers if isinstance(layers, list) else [],
        "losses": [label(name) for name, value in losses.items() if value]
        if isinstance(losses, Mapping)
        else [],
    }


def _layer_curves(rows: Sequence[Sequence[Any]]) -> dict[str, Array]:
    """Each of `LAYER_FIELDS` as [S, layers]; nothing where the number of layers changes."""
    if len({len(layers) for layers in rows}) != 1 or not rows[0]:
        return {}
    return {
        field: np.array([[_entry(layer, field) for layer in layers] for layers in rows])
        for field in LAYER_FIELDS
    }


def _entry(layer: Any, field: str) -> float:
    try:
        found = number(layer.get(field), field)
    except (AttributeError, ValueError):
        found = None
    return np.nan if found is None else found


def _counts(rows: Sequence[Sequence[Any]], field: str) -> Array | None:
    """Counts per expert, [S, layers, experts]; None unless all lines have the same full grid."""
    try:
        grid = np.array([[layer[field] for layer in layers] for layers in rows], dtype=np.float64)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return grid if grid.ndim == 3 and grid.size and np.isfinite(grid).all() else None


def _unknown(lines: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """A sentence that names the keys and kinds of line that nothing here reads."""
    kinds = {kind: None for line in lines if (kind := str(line.get("kind"))) not in _KNOWN}
    keys = {
        str(key): None
        for line in lines
        for key in line.keys() - _KNOWN.get(str(line.get("kind")), line.keys())
        if not str(key).startswith(_LOSSES)
    }
    notes = []
    for what, found in (("kind", kinds), ("key", keys)):
        if found:
            names = [clipped(label(entry), 40) for entry in sorted(found)[:6]]
            more = f" and {len(found) - 6} more" if len(found) > 6 else ""
            noun = (
                f"{counted(len(found), what)} of line"
                if what == "kind"
                else counted(len(found), what)
            )
            notes.append(f"{name} has {noun} that the report does not read: {listed(names)}{more}.")
    return notes


def _shortness(steps: int) -> list[str]:
    if steps == 0:
        return ["no training step is logged yet."]
    return ["one training step alone is logged, its curves are points."] if steps == 1 else []
