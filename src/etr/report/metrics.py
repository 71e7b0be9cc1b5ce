"""Read one run's metrics.jsonl into columns: one array per quantity, one entry per logged step."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Steps = NDArray[np.int64]

# The curves that the report draws; other keys of a line are ignored.
TRAIN_FIELDS = (
    "tokens",
    "expert_flops",
    "loss",
    "step_time_seconds",
    "kept_fraction",
    "drop_rate",
    "capacity_factor",
    "max_violation",
)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation during training."""

    step: int
    """Optimizer steps done."""
    selection: str
    """`threshold` or `dropless`."""
    expert_flops: float | None
    """Expert compute spent so far, FLOP."""
    val_loss: float | None
    """Held-out loss, nats per token."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The curves of one run, steps ascending, each step once."""

    step: Steps
    """Optimizer step, [S]."""
    train: Mapping[str, Array]
    """The quantities named in `TRAIN_FIELDS`, each [S], NaN where a line has none."""
    choices: Array | None
    """Choices per expert before dropping, [S, layers, experts]; None where not all lines agree."""
    evaluations: tuple[Evaluation, ...]
    """Evaluations, steps ascending."""
    notes: tuple[str, ...]
    """What was damaged, one sentence each."""


def number(value: Any, where: str) -> float | None:
    """A finite float, or None for null and values that are not finite.

    Raises:
        ValueError: `value` is neither a number nor null.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} must be a number or null, got {value!r}")
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) else None


def load_metrics(path: Path) -> Metrics:
    """Load one run's metrics.jsonl.

    A last line that was cut while being written is left out and noted; where a resumed run wrote
    a step again, the later line counts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line other than the last is not a JSON object, or a field is malformed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"metrics: {path} does not exist")
    lines, notes = _read_lines(path)
    train: dict[int, Mapping[str, Any]] = {}
    evaluations: dict[tuple[int, str], Evaluation] = {}
    for line_number, line in lines:
        where = f"{path.name} line {line_number}"
        kind = line.get("kind")
        if kind == "train":
            train[_step(line, where)] = {
                **{field: number(line.get(field), f"{where}: {field}") for field in TRAIN_FIELDS},
                "choices": _choices(line.get("layers")),
            }
        elif kind == "eval":
            evaluation = _evaluation(line, where)
            evaluations[evaluation.step, evaluation.selection] = evaluation
    steps = sorted(train)
    return Metrics(
        step=np.array(steps, dtype=np.int64),
        train={
            field: np.array([train[step][field] for step in steps], dtype=np.float64)
            for field in TRAIN_FIELDS
        },
        choices=_stack([train[step]["choices"] for step in steps]),
        evaluations=tuple(evaluations[key] for key in sorted(evaluations)),
        notes=tuple(notes),
    )


def _read_lines(path: Path) -> tuple[list[tuple[int, Mapping[str, Any]]], list[str]]:
    raw = path.read_bytes().split(b"\n")
    numbered = [(index, line) for index, line in enumerate(raw, start=1) if line.strip()]
    lines: list[tuple[int, Mapping[str, Any]]] = []
    for index, line in numbered:
        try:
            value = json.loads(line)
        except ValueError:  # JSON that is cut, or UTF-8 that is cut
            value = None
        if isinstance(value, Mapping):
            lines.append((index, value))
        elif index == numbered[-1][0]:
            return lines, [f"the last line of {path.name} (line {index}) is cut and left out."]
        else:
            raise ValueError(f"{path.name} line {index} is not a JSON object")
    return lines, []


def _step(line: Mapping[str, Any], where: str) -> int:
    step = line.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{where}: step must be an integer of at least 0, got {step!r}")
    return step


def _evaluation(line: Mapping[str, Any], where: str) -> Evaluation:
    return Evaluation(
        step=_step(line, where),
        selection=str(line.get("selection")),
        expert_flops=number(line.get("expert_flops"), f"{where}: expert_flops"),
        val_loss=number(line.get("val_loss"), f"{where}: val_loss"),
    )


def _choices(layers: Any) -> Array | None:
    """Choices per expert of one line, [layers, experts]; None unless it is a full grid."""
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        return None
    try:
        grid = np.array([layer["num_choices_per_expert"] for layer in layers], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        return None
    return grid if grid.ndim == 2 and grid.size and np.isfinite(grid).all() else None


def _stack(grids: Sequence[Array | None]) -> Array | None:
    shapes = {None if grid is None else grid.shape for grid in grids}
    return np.stack(grids) if len(shapes) == 1 and None not in shapes else None  # type: ignore[arg-type]
