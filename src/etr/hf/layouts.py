"""How tensors of a family's checkpoint become tensors of the layer, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A pair of functions that undo each other."""

    join: Callable[[Sequence[Tensor], int], Tensor]
    """Their tensors to ours. With experts of their own: part after part, and within a part
    expert after expert."""
    split: Callable[[Tensor, int], list[Tensor]]
    """Our tensor and the number of parts to theirs, in the same order."""


def _join_experts(tensors: Sequence[Tensor], parts: int) -> Tensor:
    """[I, H] of every expert and part to [E, parts * I, H]."""
    num_experts = len(tensors) // parts
    height, width = tensors[0].shape
    out = tensors[0].new_empty(num_experts, parts * height, width)
    for number, tensor in enumerate(tensors):
        part, expert = divmod(number, num_experts)
        out[expert, part * height : (part + 1) * height] = tensor
    return out


def _split_experts(tensor: Tensor, parts: int) -> list[Tensor]:
    return [expert for part in tensor.chunk(parts, dim=1) for expert in part.unbind()]


def _pairs_to_halves(tensor: Tensor, dim: int) -> Tensor:
    """Values in turns (a, b, a, b) to all of a, then all of b."""
    return torch.cat(tensor.unflatten(dim, (-1, 2)).unbind(dim + 1), dim)


def _halves_to_pairs(tensor: Tensor, dim: int) -> Tensor:
    return torch.stack(tensor.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def _one(tensors: Sequence[Tensor]) -> Tensor:
    (tensor,) = tensors
    return tensor


LAYOUTS: dict[str, Layout] = {
    # One tensor, the same in both places.
    "same": Layout(join=lambda tensors, parts: _one(tensors), split=lambda tensor, parts: [tensor]),
    # One [I, H] for each expert and part; ours [E, parts * I, H].
    "experts": Layout(join=_join_experts, split=_split_experts),
    # One [I, H] for each part of a single expert; ours [1, parts * I, H].
    "one": Layout(
        join=lambda tensors, parts: torch.cat(list(tensors)).unsqueeze(0),
        split=lambda tensor, parts: list(tensor[0].chunk(parts)),
    ),
    # [E, in, out]; ours [E, out, in].
    "transposed": Layout(
        join=lambda tensors, parts: _one(tensors).transpose(1, 2),
        split=lambda tensor, parts: [tensor.transpose(1, 2)],
    ),
    # [E, 2I] with gate and up in turns; ours has all gates first.
    "pairs": Layout(
        join=lambda tensors, parts: _pairs_to_halves(_one(tensors), 1),
        split=lambda tensor, parts: [_halves_to_pairs(tensor, 1)],
    ),
    # [E, H, 2I] with gate and up in turns; ours [E, 2I, H], all gates first.
    "transposed_pairs": Layout(
        join=lambda tensors, parts: _pairs_to_halves(_one(tensors), 2).transpose(1, 2),
        split=lambda tensor, parts: [_halves_to_pairs(tensor.transpose(1, 2), 2)],
    ),
}
"""Layouts by name."""
