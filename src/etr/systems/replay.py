"""A trace in a fast memory that holds a few experts.

A replay touches no value of a model: it walks the choices of a trace in decoding order, token after
token and in each token layer after layer, or pass after pass, and counts which experts were there
already.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from etr.systems.cache import Cache, Memory, Replayed


def replay(
    choices: Tensor,
    cache: Cache,
    size: int,
    *,
    num_experts: int,
    shared: bool = False,
    forward: Tensor | None = None,
    step: Tensor | None = None,
    expected: Tensor | None = None,
) -> Replayed:
    """Use the experts of a trace in decoding order, from an empty memory.

    Args:
        choices: int64 [L, N, K], negative where a token has fewer.
        cache: who leaves.
        size: experts that a memory holds.
        num_experts: E of each layer.
        shared: one memory for all layers, and not one each.
        forward: number of the forward pass that each token is part of, int64 [N], equal ones side
            by side; a pass uses each of its experts once. None: one for each token.
        step: of a model that fills blocks, in the place of `forward`: number in its block of the
            step that each token is part of, negative where the pass fills none, int [N]; equal ones
            side by side are one pass.
        expected: what was predicted, int64 [L, N, K'], for a policy that predicts; not with
            `forward` or `step`.
    Raises:
        ValueError: wrong sizes, an expert that there is not, or no prediction for who needs one.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1, experts")
    _check(choices, num_experts, "choices")
    if step is not None and forward is not None:
        raise ValueError("give forward or step: equal steps side by side are one pass")
    numbers: list[int] = []
    if step is not None:
        passes, forward = _passes(step, choices)
        numbers = passes.tolist()
    steps = _steps(choices, num_experts, shared, forward)
    guesses: list[list[dict[int, int]]] = [[] for _ in steps]
    if cache.predicts:
        if expected is None or forward is not None:
            raise ValueError(
                f"cache {cache.name!r} goes by predicted choices of each token; give expected, and "
                "neither forward nor step"
            )
        _check(expected, num_experts, "expected")
        guesses = _steps(expected, num_experts, shared, None)
    memories = []
    for memory_steps, guess in zip(steps, guesses, strict=True):
        flat = [expert for step in memory_steps for expert in step]
        policy = cache.start(flat, [list(step) for step in guess])
        layers = len(choices) if shared else 1
        policy.shared_by(layers, num_experts)
        memories.append(Memory(policy, size))
        _use(memories[-1], memory_steps, [number * layers for number in numbers], layers)
    return Replayed.of(memories)


def _use(memory: Memory, steps: list[dict[int, int]], numbers: list[int], layers: int) -> None:
    """Use experts step by step; each of the numbers, if any, is that of the first of `layers`."""
    for place, used in enumerate(steps):
        if numbers and place % layers == 0:
            memory.count_from(numbers[place // layers])
        memory.begin(used)
        for expert in used:
            memory.use(expert)


def _check(choices: Tensor, num_experts: int, name: str) -> None:
    if choices.ndim != 3:
        raise ValueError(f"{name} has shape {tuple(choices.shape)}; it must be [L, N, K]")
    if choices.numel() and choices.max() >= num_experts:
        raise ValueError(f"{name} holds {int(choices.max())}; num_experts={num_experts}")


def _passes(step: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """Step of each pass, and the pass of each token."""
    if step.shape != choices.shape[1:2]:
        raise ValueError(
            f"step has shape {tuple(step.shape)}; choices has {choices.shape[1]} tokens"
        )
    return torch.unique_consecutive(step, return_inverse=True)


def _steps(
    choices: Tensor, num_experts: int, shared: bool, forward: Tensor | None
) -> list[list[dict[int, int]]]:
    """Experts of every step and their tokens, for every memory."""
    parts = [choices[:, i : i + 1] for i in range(choices.shape[1])]
    if forward is not None:
        lengths = torch.unique_consecutive(forward, return_counts=True)[1].tolist()
        parts = list(choices.split(lengths, 1)) if lengths else []
    # [part][layer] -> experts in the order of first use, and how many tokens
    found = [[_counted(layer) for layer in part.flatten(1).tolist()] for part in parts]
    if not shared:
        return [[part[layer] for part in found] for layer in range(len(choices))]
    first = range(0, len(choices) * num_experts, num_experts)
    return [
        [
            {expert + n: count for expert, count in one.items()}
            for part in found
            for n, one in zip(first, part, strict=True)
        ]
    ]


def _counted(experts: list[int]) -> dict[int, int]:
    return Counter(expert for expert in experts if expert >= 0)


def counts_of_passes(choices: Tensor, step: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """What each pass of a model that fills blocks asked of the experts.

    Args:
        choices: int64 [L, N, K], negative where a token has fewer.
        step: see `replay`.
        num_experts: E of each layer.
    Returns:
        Tokens of each expert in each of P passes, int64 [L, P, E]; and the step of each, [P].
    """
    _check(choices, num_experts, "choices")
    steps, number = _passes(step, choices)
    found = torch.zeros(len(choices), len(steps), num_experts + 1, dtype=torch.int64)
    expert = torch.where(choices < 0, num_experts, choices).flatten(1)
    place = number.repeat_interleave(choices.shape[2]) * (num_experts + 1) + expert
    found.flatten(1).scatter_add_(1, place, torch.ones_like(place))
    return found[..., :num_experts], steps
