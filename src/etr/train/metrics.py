"""What is measured at each step, and the file it is written to."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from etr.files import JsonLine, json_lines, write_bytes
from etr.hf import EtrForCausalLM
from etr.moe import MoE, moe_layers
from etr.moe.experts import Bank
from etr.moe.lower_bound import erfc_bound
from etr.moe.notice import warn
from etr.moe.stats import routing_shares
from etr.parallel import Ranks, gradient_norms, local_part

NUMBERS = {
    "train": (
        *("tokens", "expert_flops", "step_time_seconds", "loss"),
        *("kept_fraction", "drop_rate", "capacity_factor", "max_violation"),
    ),
    "eval": ("val_loss", "kept_fraction_eval"),
}
"""What a row of a kind must have to be read here; the report asks for less."""
COUNTS = ("num_tokens_per_expert", "num_choices_per_expert")


class MetricsFile:
    """Appends one JSON object a line; a row is on disk before the next is written.

    Args:
        path: the file.
        after_step: on resuming, rows of later steps and a last line cut short are removed first,
            and any other line stays as it is, whatever it holds; 0 starts afresh.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        content = path.read_bytes() if after_step and path.exists() else b""
        kept = [line.raw + b"\n" for line in json_lines(content) if _stays(line, after_step)]
        write_bytes(path, b"".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _stays(line: JsonLine, after_step: int) -> bool:
    step = _step(line.row or {})
    return not line.is_cut and (step is None or step <= after_step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics file; a last line cut short is left out.

    So is any other line that is not a row, and a warning names it.
    """
    lines = [line for line in json_lines(path.read_bytes()) if not line.is_cut]
    problems = {line.number: _problem(line.row) for line in lines}
    damaged = [f"line {number} {problem}" for number, problem in problems.items() if problem]
    if damaged:
        more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        warn(
            f"{path} has lines that are not rows of metrics; they stay there and are not read: "
            f"{', '.join(damaged[:5])}{more}"
        )
    return [line.row for line in lines if line.row is not None and not problems[line.number]]


def _problem(row: dict[str, Any] | None) -> str | None:
    """Why a line cannot be read; completes a sentence."""
    if row is None:
        return "is not a JSON object"
    if _step(row) is None:
        return "has no step"
    kind = str(row.get("kind"))
    for name in NUMBERS.get(kind, ()):
        if not _is_number(row.get(name)):
            return f"has no number {name!r}"
    if kind == "train" and not (_has_numbers(row.get("losses")) and _has_counts(row.get("layers"))):
        return "has no losses, or no counts of its layers"
    if kind == "eval" and not _has_numbers(row.get("val_loss_by_domain")):
        return "has no losses by domain"
    return None


def _step(row: dict[str, Any]) -> int | None:
    step = row.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1 << 63
    return isinstance(value, float)


def _has_numbers(values: Any) -> bool:
    return isinstance(values, dict) and all(map(_is_number, values.values()))


def _has_counts(layers: Any) -> bool:
    """Whether there is a number for every layer and expert, and what limits a layer is one."""
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        return False
    counts = [layer.get(name) for layer in layers for name in COUNTS]
    others = [layer.get(name) for layer in layers for name in ("capacity", "router_grad_norm")]
    return (
        all(isinstance(values, list) and all(map(_is_number, values)) for values in counts)
        and len({len(values) for values in counts if values is not None}) == 1
        and all(value is None or _is_number(value) for value in others)
    )


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
            affinities, tokens; None where scores are not cosines.
        kept_affinity_mass: gates of kept pairs over gates of chosen ones; None where not counted.
    """
    experts = layer.config.num_choices
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


def layers_in_words(model: EtrForCausalLM, ranks: Ranks) -> str:
    """Layers' scores, weights and load in a few words, for an error; all ranks ask together."""
    layers = moe_layers(model)
    return "; ".join([nonfinite_in_words(layers, ranks), *map(_layer_in_words, layers)])


def _layer_in_words(layer: MoE) -> str:
    """One layer's weights and load; of this rank's part."""
    counts = layer.pending.get("num_tokens_per_expert")
    kept = "none" if counts is None else counts.tolist()
    parts = [local_part(p.detach()).float() for p in layer.parameters()]
    norm = sum(float(part.norm()) ** 2 for part in parts) ** 0.5
    return f"layer {layer.layer_index}: weight norm {norm:.3g}, kept {kept}"


def nonfinite_in_words(layers: Sequence[MoE], ranks: Ranks) -> str:
    """Where tokens of the last step have NaN or infinite router scores, by rank; for an error.

    All ranks must ask together.
    """
    counts = [int(layer.pending.get("num_nonfinite_tokens", 0)) for layer in layers]
    found = [
        f"layer {layer.layer_index}{f' on rank {rank}' if ranks.size > 1 else ''}: {count}"
        for rank, of_rank in enumerate(ranks.gather(counts))
        for layer, count in zip(layers, of_rank, strict=True)
        if count
    ]
    return f"tokens with NaN or infinite router scores: {', '.join(found) or 'none'}"


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
    """Floating-point operations of the experts on kept tokens, forward and backward.

    Shared experts, and what a bank computes beside its experts, run for every token.
    A multiply-add counts as two; the backward pass costs twice the forward. Padding that a backend
    computes in vain is not counted.
    """
    total = 0.0
    for layer, counts in zip(moe_layers(model), stats, strict=True):
        if counts:
            total += 3 * float(layer.bank.flops(counts["num_tokens_per_expert"]))
            each = layer.bank.flops_of_any_token
            if layer.shared_experts is not None:
                each += 2 * layer.shared_experts.size_of_one
            if each:
                total += 3 * each * float(counts["num_valid_tokens"])
    return total


def count_parameters(model: EtrForCausalLM) -> tuple[int, int]:
    """All parameters, and those that one token uses at most (top_k of the routed experts)."""
    total = sum(p.numel() for p in model.parameters())
    used: dict[Bank, float] = {}  # layers may share one
    for layer in moe_layers(model):
        own = layer.bank.parameters_of_a_token(layer.config.most_choices)
        used[layer.bank] = used.get(layer.bank, 0.0) + own
    sizes = {bank: sum(p.numel() for p in bank.parameters()) for bank in used}
    idle = sum(size - min(used[bank], size) for bank, size in sizes.items())
    return total, int(total - idle)
