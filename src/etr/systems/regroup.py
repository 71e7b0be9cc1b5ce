"""Which sequences run together, and how many experts their batches use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def uses(choices: Tensor, sequence: Tensor, num_experts: int) -> Tensor:
    """How often each sequence uses each expert of each layer, int64 [Q, L, E].

    Args:
        choices: int64 [L, N, K], negative where a token has fewer than K.
        sequence: of each token, int64 [N]; its numbers do not fall.
    """
    number = torch.unique_consecutive(sequence, return_inverse=True)[1]
    count = int(number[-1]) + 1 if len(number) else 0
    found = torch.zeros(count, len(choices), num_experts + 1, dtype=torch.int64)
    expert = choices.clamp_min(-1).transpose(0, 1) + 1  # 0 where there is none
    one = F.one_hot(expert, num_experts + 1).sum(2)
    return found.index_add(0, number, one)[..., 1:]


def regrouped(expected: Tensor, size: int) -> list[list[int]]:
    """Sequences in batches whose expected experts overlap.

    One after the other, a sequence takes those nearest to it by the cosine of what they expect.

    Args:
        expected: use of each expert of all layers, by sequence, float [Q, L * E].
        size: sequences of a batch.
    Returns:
        Numbers of sequences, each once.
    """
    rows = F.normalize(expected.double(), dim=-1)
    left, batches = list(range(len(rows))), []
    while left:
        near = (rows[left] @ rows[left[0]]).argsort(descending=True, stable=True)[:size]
        batches.append([left[place] for place in near.tolist()])
        left = [number for number in left if number not in batches[-1]]
    return batches


def experts_of_batches(used: Tensor, batches: Sequence[Sequence[int]]) -> float:
    """Different experts that a batch uses of a layer, on average over both.

    Args:
        used: see `uses`, [Q, L, E].
        batches: numbers of sequences.
    """
    found = [(used[list(batch)].sum(0) > 0).sum(-1).double().mean() for batch in batches]
    return float(torch.stack(found).mean())
