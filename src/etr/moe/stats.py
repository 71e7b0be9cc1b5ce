"""Counters of one forward: pure functions, on the device, summable over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from etr.moe.routing import Kept, Routing


@torch.no_grad()
def routing_stats(routing: Routing, found: Kept) -> dict[str, Tensor]:
    """Count what was asked for and what was kept.

    Where experts choose, what they take is the choice: nothing is dropped, and tokens that nobody
    took show as tokens without an expert.

    Returns:
        num_forwards, num_valid_tokens: int64 [].
        num_nonfinite_tokens: valid tokens for which the router computed NaN or infinity, int64 [];
            always 0 where the router reads no token (`hash` and `random`).
        num_choices_per_expert: before dropping, int64 [E].
        num_tokens_per_expert: kept, int64 [E].
        num_slots: pairs that could have been kept, int64 [].
        num_tokens_without_expert: valid tokens with no kept pair, int64 [].
        capacity_sum: summed capacity of all experts in tokens, int64 []; valid tokens times E
            where there is no limit.
        gate_sum, kept_gate_sum: gates of all choices and of the kept ones, float [].
    """
    selection, limit = found.selection, found.limit
    kept = selection.num_tokens_per_expert
    tokens = routing.num_valid_tokens()
    served = routing.by_token(selection.kept).any(1).sum()  # no padding among them
    gate = routing.gate.detach()
    chosen_gates = kept_gates = gate.sum()
    if not selection.all_kept:
        kept_gates = gate.masked_fill(~selection.kept, 0.0).sum()
    if not routing.full:
        chosen_gates = gate.masked_fill(~routing.valid, 0.0).sum()
    capacity = tokens * routing.num_experts if limit.capacity is None else limit.capacity.sum()
    return {
        "num_forwards": torch.ones_like(tokens),
        "num_valid_tokens": tokens,
        "num_nonfinite_tokens": _num_nonfinite_tokens(routing),
        "num_choices_per_expert": found.num_choices_per_expert,
        "num_tokens_per_expert": kept,
        "num_slots": found.num_slots,
        "num_tokens_without_expert": tokens - served,
        "capacity_sum": capacity,
        "gate_sum": chosen_gates if routing.tokens_choose else kept_gates,
        "kept_gate_sum": kept_gates,
    }


def _num_nonfinite_tokens(routing: Routing) -> Tensor:
    found = routing.by_token(routing.gate) if routing.logits is None else routing.logits
    total = found.sum(-1)  # a sum holds what any of its terms does
    bad = total - total != 0
    return (bad if routing.full else bad & routing.valid_mask).sum()


def target_kept(stats: Mapping[str, Tensor]) -> Tensor:
    """Choosers that the thresholds must keep: what the policy, or the one it imitates, kept."""
    return stats.get("num_target_tokens_per_expert", stats["num_tokens_per_expert"])


class Counters(Mapping[str, Tensor]):
    """Counters that are found when they are first read.

    Args:
        found: counters, or what finds them.
    """

    def __init__(self, found: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]) -> None:
        self._found = found

    def _read(self) -> Mapping[str, Tensor]:
        if not isinstance(self._found, Mapping):
            self._found = self._found()
        return self._found

    def __getitem__(self, name: str) -> Tensor:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[type[Counters], tuple[dict[str, Tensor]]]:
        return Counters, (dict(self),)


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


def routing_shares(
    stats: Sequence[Mapping[str, Tensor]], top_k: int | Sequence[int]
) -> dict[str, float]:
    """Counters of one step as plain numbers, all layers together; empty where none ran.

    Args:
        stats: what `after_step` returned, one dictionary per layer.
        top_k: experts a token may choose, in all layers or in each.
    Returns:
        kept_fraction: kept pairs over those that could have been kept: valid tokens * top_k, or
            where experts choose what they have room for; at most 1, also where thresholds let
            through more than that.
        kept_per_choice: kept pairs over valid tokens * top_k, whoever chooses.
        drop_rate: share of choices that were dropped.
        tokens_without_expert: share of valid tokens.
        capacity_mean: mean limit of an expert in one forward, tokens.
        capacity_factor: summed limits over valid tokens * top_k.
        max_violation: mean over layers of `max_violation` of the choices.
        router_loss_NAME: mean over forwards, ranks and layers of each scaled loss; 0 in a layer
            that does not have it.
    """
    each = [top_k] * len(stats) if isinstance(top_k, int) else top_k
    ks = [k for k, layer in zip(each, stats, strict=True) if layer]
    layers = [{k: v.cpu() for k, v in layer.items() if v.dim() < 2} for layer in stats if layer]
    if not layers:
        return {}
    choices = [layer["num_choices_per_expert"] for layer in layers]
    kept = sum(int(layer["num_tokens_per_expert"].sum()) for layer in layers)
    tokens = sum(int(layer["num_valid_tokens"]) for layer in layers)
    capacity = sum(int(layer["capacity_sum"]) for layer in layers)
    rooms = sum(int(x["num_forwards"]) * len(c) for x, c in zip(layers, choices, strict=True))
    alone = sum(int(layer["num_tokens_without_expert"]) for layer in layers)
    asked = sum(int(x["num_valid_tokens"]) * k for x, k in zip(layers, ks, strict=True))
    slots = max(asked, 1)
    return {
        "kept_fraction": kept_share(kept, sum(int(layer["num_slots"]) for layer in layers)),
        "kept_per_choice": kept / slots,
        "drop_rate": 1 - kept / max(sum(int(c.sum()) for c in choices), 1),
        "tokens_without_expert": alone / max(tokens, 1),
        "capacity_mean": capacity / rooms,
        "capacity_factor": capacity / slots,
        "max_violation": float(torch.stack([max_violation(c) for c in choices]).mean()),
        **{
            f"router_{name}": sum(float(x[name] / x["num_forwards"]) for x in layers if name in x)
            / len(layers)
            for name in dict.fromkeys(name for layer in layers for name in layer)
            if name.startswith("loss_")
        },
    }


def kept_share(kept: int, slots: int) -> float:
    """Kept pairs over those that could have been kept, at most 1; 0 without any."""
    return min(1.0, kept / max(slots, 1))


def add_stats(total: Mapping[str, Tensor], more: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum two dictionaries of counters; a name may be in one only."""
    both = {name: total[name] + more[name] for name in total if name in more}
    return {**total, **more, **both}
