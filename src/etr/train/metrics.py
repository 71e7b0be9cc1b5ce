"""What is measured at each step, and the file it is written to."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etr.hf import EtrForCausalLM
from etr.moe import MoE, moe_layers
from etr.moe.lower_bound import erfc_bound
from etr.moe.stats import routing_shares
from etr.parallel import Ranks, gradient_norms, local_part


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


def routing_metrics(stats: list[dict[str, Tensor]], top_k: int) -> dict[str, Any]:
    """Counters of a step as plain numbers, summed over layers where they are shares.

    Args:
        stats: what `after_step` returned, one dictionary per layer.
        top_k: experts a token may choose.
    """
    shares = routing_shares(stats, top_k)
    if not shares:
        return {}
    counts = ("num_tokens_per_expert", "num_choices_per_expert")
    return {
        **shares,
        **_bytes_sent(stats),
        "layers": [
            {name: layer[name].tolist() for name in counts} | _bytes_sent([layer])
            for layer in stats
            if layer
        ],
    }


def _bytes_sent(stats: list[dict[str, Tensor]]) -> dict[str, int]:
    """Bytes that all ranks sent in the forward passes of a step; none on one process."""
    names = ("bytes_within_node", "bytes_between_nodes", "bytes_between_nodes_padded")
    return {
        name: sum(int(layer[name]) for layer in stats if layer)
        for name in names
        if any(name in layer for layer in stats)
    }


def layer_metrics(layer: MoE, stats: dict[str, Tensor]) -> dict[str, float | None]:
    """What limits one layer, and what that costs it.

    Args:
        layer: an MoE layer, after its optimizer step.
        stats: its counters of that step.
    Returns:
        capacity: mean limit of an expert in one forward, tokens; None where nothing limits.
        capacity_lower_bound: of arXiv 2406.00023, Remark 7, at the 99th percentile of chosen
            affinities, tokens; None where scores are no cosines.
        kept_affinity_mass: gates of kept pairs over gates of chosen ones; None where not counted.
    """
    experts = layer.config.num_experts
    capacity = int(stats["capacity_sum"])
    limited = capacity < int(stats["num_valid_tokens"]) * experts
    bound = None
    if layer.traits.has_cosine:
        p99 = layer.calibration.affinity_p99
        bound = finite(erfc_bound(layer.config.hidden_size, experts, p99))
    mass = None
    if "kept_gate_sum" in stats and float(stats["gate_sum"]) > 0:
        mass = float(stats["kept_gate_sum"]) / float(stats["gate_sum"])
    return {
        "capacity": capacity / (int(stats["num_forwards"]) * experts) if limited else None,
        "capacity_lower_bound": bound,
        "kept_affinity_mass": mass,
    }


def layer_in_words(layer: MoE) -> str:
    """One layer's weights and load in a few words, for an error; of this rank's part."""
    counts = layer.pending.get("num_tokens_per_expert")
    kept = "none" if counts is None else counts.tolist()
    parts = [local_part(p.detach()).float() for p in layer.parameters()]
    norm = sum(float(part.norm()) ** 2 for part in parts) ** 0.5
    return f"layer {layer.layer_index}: weight norm {norm:.3g}, kept {kept}"


def router_grad_norms(model: EtrForCausalLM, ranks: Ranks) -> list[float | None]:
    """Norm of the gradient of each layer's router; None where it has no parameter to train."""
    routers = [
        [p for p in layer.router.parameters() if p.requires_grad] for layer in moe_layers(model)
    ]
    norms = gradient_norms(routers, ranks)
    return [finite(norm) if trained else None for trained, norm in zip(routers, norms, strict=True)]


def memory_bytes(device: torch.device) -> int | None:
    """Most memory in use so far: of the accelerator's allocator, else of this process.

    On a CPU, runs that share a process share this number. None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def finite(value: Tensor | float) -> float | None:
    """A number as JSON can hold it: None for nan and infinity."""
    value = float(value)
    return value if math.isfinite(value) else None


def expert_flops(model: nn.Module, stats: Iterable[dict[str, Tensor]]) -> float:
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
