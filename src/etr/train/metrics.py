"""What is measured at each step, and the file it is written to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from etr.hf import EtrForCausalLM
from etr.moe import moe_layers
from etr.moe.stats import max_violation


class MetricsFile:
    """Appends one JSON object a line; a row is on disk before the next is written.

    Args:
        path: the file.
        after_step: on resuming, rows of later steps and a line cut short are removed first; 0
            starts afresh.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        kept = []
        if after_step and path.exists():
            kept = [row for row in read_metrics(path) if row["step"] <= after_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class ScalarSink(Protocol):
    """What TensorBoard's SummaryWriter offers."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def close(self) -> None: ...


def tensorboard_sink(folder: Path) -> ScalarSink | None:
    """A TensorBoard writer where the extra is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    sink: ScalarSink = SummaryWriter(str(folder))
    return sink


def routing_metrics(stats: list[dict[str, Tensor]], top_k: int) -> dict[str, Any]:
    """Counters of a step as plain numbers, summed over layers where they are shares.

    Args:
        stats: what `after_step` returned, one dictionary per layer.
        top_k: experts a token may choose.
    """
    stats = [{k: v.cpu() for k, v in layer.items() if v.dim() < 2} for layer in stats if layer]
    if not stats:
        return {}
    choices = torch.stack([layer["num_choices_per_expert"] for layer in stats])
    kept = torch.stack([layer["num_tokens_per_expert"] for layer in stats])
    tokens = sum(int(layer["num_valid_tokens"]) for layer in stats)
    num_experts = choices.shape[1]
    capacity = sum(int(layer["capacity_sum"]) for layer in stats)
    forwards = sum(int(layer["num_forwards"]) for layer in stats)
    slots = max(tokens * top_k, 1)
    return {
        "kept_fraction": int(kept.sum()) / slots,
        "drop_rate": 1 - int(kept.sum()) / max(int(choices.sum()), 1),
        "tokens_without_expert": sum(int(x["num_tokens_without_expert"]) for x in stats)
        / max(tokens, 1),
        "capacity_mean": capacity / (forwards * num_experts),
        "capacity_factor": capacity / slots,
        "max_violation": float(max_violation(choices).mean()),
        "layers": [
            {"num_tokens_per_expert": kept_row, "num_choices_per_expert": choice_row}
            for kept_row, choice_row in zip(kept.tolist(), choices.tolist(), strict=True)
        ],
    }


def expert_flops(model: EtrForCausalLM, stats: Iterable[dict[str, Tensor]]) -> float:
    """Floating-point operations of the routed experts on kept tokens, forward and backward.

    A multiply-add counts as two; the backward pass costs twice the forward. Padding that a backend
    computes in vain is not counted.
    """
    total = 0.0
    for layer, counts in zip(moe_layers(model), stats, strict=True):
        if counts:
            weights = sum(p.numel() for p in layer.experts.parameters()) / layer.config.num_experts
            total += 6.0 * weights * float(counts["num_tokens_per_expert"].sum())
    return total


def count_parameters(model: EtrForCausalLM) -> tuple[int, int]:
    """All parameters, and those that one token uses at most (top_k of the routed experts)."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0.0
    for layer in moe_layers(model):
        routed = sum(p.numel() for p in layer.experts.parameters())
        idle += routed * (1 - layer.config.top_k / layer.config.num_experts)
    return total, int(total - idle)
