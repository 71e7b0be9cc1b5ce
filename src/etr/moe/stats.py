"""Counters of one forward: pure functions, on the device, summable over micro-batches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from etr.moe.routing import Limit, Routing, Selection


@torch.no_grad()
def routing_stats(routing: Routing, selection: Selection, limit: Limit) -> dict[str, Tensor]:
    """Count what was asked for and what was kept.

    Where experts choose, what they take is the choice: nothing is dropped, and tokens that nobody
    took show as tokens without an expert.

    Returns:
        num_forwards, num_valid_tokens: int64 [].
        num_choices_per_expert: before dropping, int64 [E].
        num_tokens_per_expert: kept, int64 [E].
        num_tokens_without_expert: valid tokens with no kept pair, int64 [].
        capacity_sum: summed capacity of all experts in tokens, int64 []; valid tokens times E
            where there is no limit.
        gate_sum, kept_gate_sum: gates of all choices and of the kept ones, float [].
    """
    kept = selection.num_tokens_per_expert
    tokens = routing.num_valid_tokens()
    served = torch.zeros(routing.num_tokens, dtype=torch.int64, device=kept.device)
    served.index_add_(0, routing.token, selection.kept.long())
    gate = routing.gate.detach()
    kept_gates = torch.where(selection.kept, gate, 0.0).sum()
    chosen_gates = torch.where(routing.valid, gate, 0.0).sum()
    capacity = tokens * routing.num_experts if limit.capacity is None else limit.capacity.sum()
    return {
        "num_forwards": torch.ones_like(tokens),
        "num_valid_tokens": tokens,
        "num_choices_per_expert": (
            routing.num_choices_per_expert() if routing.tokens_choose else kept
        ),
        "num_tokens_per_expert": kept,
        "num_tokens_without_expert": ((served == 0) & routing.valid_mask).sum(),
        "capacity_sum": capacity,
        "gate_sum": chosen_gates if routing.tokens_choose else kept_gates,
        "kept_gate_sum": kept_gates,
    }


def max_violation(num_choices_per_expert: Tensor) -> Tensor:
    """MaxVio: largest over mean load, minus 1; 0 is perfect balance, E - 1 is collapse.

    Args:
        num_choices_per_expert: [..., E].
    Returns:
        float64 [...]; 0 without tokens.
    """
    load = num_choices_per_expert.double()
    mean = load.mean(-1)
    return torch.where(mean > 0, load.amax(-1) / mean.clamp_min(1e-30) - 1, 0.0)


def add_stats(total: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum two dictionaries of counters; a name may be in one only."""
    return {
        name: total[name] + more[name]
        if name in total and name in more
        else total.get(name, more.get(name))  # type: ignore[misc]
        for name in {**total, **more}
    }
