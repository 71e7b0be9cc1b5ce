"""Integer hashing on tensors, the same on every device, rank and batch split."""

from __future__ import annotations

import torch
from torch import Tensor

from etr.moe.routing import Scores

_MASK = 0x7FFFFFFF


def mix(value: Tensor, salt: Tensor | int) -> Tensor:
    """Hash int64 values with a salt to [0, 2^31), int64.

    Two rounds of multiply and xor-shift on 31-bit words: products stay below 2^62, so int64 never
    overflows, whatever the device does on overflow.
    """
    word = ((value & _MASK) ^ ((value >> 31) & _MASK) ^ salt) & _MASK
    for multiplier in (0x2C1B3C6D, 0x297A2D39):
        word = word ^ (word >> 16)
        word = (word * multiplier) & _MASK
    return word ^ (word >> 15)


def distinct_experts(key: Tensor, top_k: int, num_experts: int) -> Tensor:
    """Draw `top_k` different experts for each hashed key.

    The first k steps of a Fisher-Yates shuffle, written as an order of hashed expert numbers.

    Args:
        key: int64 [T].
    Returns:
        int64 [T, top_k].
    """
    expert = torch.arange(num_experts, device=key.device)
    draws = mix(key[:, None] + (expert + 1) * 0x9E3779B1, 0x5BD1E995)
    return draws.argsort(dim=-1, stable=True)[:, :top_k]


def unlearned_scores(x: Tensor, expert: Tensor, top_k: int, num_experts: int) -> Scores:
    """Tables in which the drawn experts score 1 and every gate is 1 / top_k."""
    table = torch.zeros(x.shape[0], num_experts, dtype=x.dtype, device=x.device)
    table = table.scatter(1, expert, 1.0)
    return Scores(scores=table, logits=None, gates=torch.full_like(table, 1.0 / top_k), probs=None)
