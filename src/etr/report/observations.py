"""Rows of metrics.jsonl that are not of every step: evaluations, diagnostics, profiles, alarms.

What is malformed becomes None: these rows are extras, and one bad field costs its figure alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etr.report.histogram import Histogram, parse_histogram

Array = NDArray[np.float64]
CLUSTERINGS = ("all", "kept", "trimmed")
SPANS = ("computation", "communication", "overlapped", "idle")


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
    kept_fraction: float | None
    """Share of choices that experts kept."""
    bound: bool = False
    """Whether the loss is an upper bound of the text's nats."""


@dataclass(frozen=True, kw_only=True)
class LayerDiagnostics:
    """What one MoE layer does to its tokens at one step; None where not measured."""

    calinski_harabasz: Mapping[str, float | None]
    """Spread between experts' tokens over spread within, for each of `CLUSTERINGS`."""
    expert_similarity: Array | None
    """Cosine of experts' outputs on the same tokens, [E, E]."""
    domain_expert: Array | None
    """Choices by domain and expert, [D, E]."""
    mutual_information_bits: float | None
    """Mutual information of domain and expert, bits."""
    affinity: Histogram | None
    """Scores of chosen experts and of all others."""


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """What the MoE layers do at one step."""

    step: int
    """Optimizer steps done."""
    domains: tuple[str, ...]
    """Names of the rows of `domain_expert`."""
    layers: tuple[LayerDiagnostics, ...]
    """MoE layers, from the input."""
    token_correlation: Array | None
    """Correlation of tokens at the input of the last MoE layer, ordered by expert, [n, n]."""
    token_expert: tuple[int, ...]
    """Chosen expert of each of those tokens; may be empty."""


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One kind of operation inside a forward and backward pass."""

    name: str
    """What the profiler calls it."""
    seconds: float
    """Time in it, without what it calls."""
    calls: int
    """How often."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where the time of a forward and backward pass went."""

    step: int
    """Optimizer steps done."""
    seconds: Mapping[str, float]
    """Seconds of each of `SPANS`; overlapped time is part of computation and of communication."""
    operators: tuple[Operator, ...]
    """The longest operators, longest first."""


@dataclass(frozen=True, kw_only=True)
class LoggedAlarm:
    """Something that training says went wrong."""

    step: int
    """Optimizer steps done."""
    name: str
    """Kind of alarm."""
    layer: int | None
    """Which MoE layer; None for the whole model."""
    message: str
    """What happened, in plain words."""


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


def parse_evaluation(line: Mapping[str, Any], step: int, where: str) -> Evaluation:
    """One line of kind `eval`.

    Raises:
        ValueError: a number is not one.
    """
    return Evaluation(
        step=step,
        selection=str(line.get("selection")),
        expert_flops=number(line.get("expert_flops"), f"{where}: expert_flops"),
        val_loss=number(line.get("val_loss"), f"{where}: val_loss"),
        kept_fraction=number(line.get("kept_fraction_eval"), f"{where}: kept_fraction_eval"),
        bound=line.get("bound") is True,
    )


def parse_diagnostics(line: Mapping[str, Any], step: int) -> Diagnostics:
    """One line of kind `diagnostics`."""
    correlation = _matrix(line.get("token_correlation"))
    if correlation is not None and correlation.shape[0] != correlation.shape[1]:
        correlation = None
    return Diagnostics(
        step=step,
        domains=tuple(label(name) for name in _list(line.get("domains"))),
        layers=tuple(_layer(raw) for raw in _list(line.get("layers")) if isinstance(raw, Mapping)),
        token_correlation=correlation,
        token_expert=tuple(e for e in _list(line.get("token_expert")) if isinstance(e, int)),
    )


def parse_profile(line: Mapping[str, Any], step: int) -> Profile:
    """One line of kind `profile`."""
    operators = [
        Operator(
            name=label(raw.get("name")), seconds=seconds, calls=int(_number(raw.get("calls")) or 0)
        )
        for raw in _list(line.get("operators"))
        if isinstance(raw, Mapping) and (seconds := _number(raw.get("seconds"))) is not None
    ]
    return Profile(
        step=step,
        seconds={
            span: seconds
            for span in SPANS
            if (seconds := _number(line.get(f"{span}_seconds"))) is not None
        },
        operators=tuple(sorted(operators, key=lambda operator: -operator.seconds)),
    )


def parse_alarm(line: Mapping[str, Any], step: int) -> LoggedAlarm:
    """One line of kind `alarm`."""
    layer = line.get("layer")
    return LoggedAlarm(
        step=step,
        name=label(line.get("name") or "alarm"),
        layer=layer if isinstance(layer, int) else None,
        message=label(line.get("message") or ""),
    )


def label(value: Any) -> str:
    """One line of what can be printed: control characters would break SVG and tables."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return " ".join(text.split())


def _layer(raw: Mapping[str, Any]) -> LayerDiagnostics:
    try:
        affinity = parse_histogram(raw, "diagnostics", prefix="affinity_")
    except ValueError:
        affinity = None
    similarity = _matrix(raw.get("expert_similarity"))
    if similarity is not None and similarity.shape[0] != similarity.shape[1]:
        similarity = None
    return LayerDiagnostics(
        calinski_harabasz={
            name: _number(raw.get(f"calinski_harabasz_{name}")) for name in CLUSTERINGS
        },
        expert_similarity=similarity,
        domain_expert=_matrix(raw.get("domain_expert")),
        mutual_information_bits=_number(raw.get("mutual_information_bits")),
        affinity=affinity,
    )


def _number(value: Any) -> float | None:
    try:
        return number(value, "")
    except ValueError:
        return None


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _matrix(value: Any) -> Array | None:
    """A full matrix with at least one finite entry, else None; null becomes NaN."""
    if not isinstance(value, list):
        return None
    try:
        found = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if found.ndim == 2 and found.size and np.isfinite(found).any() else None
