"""LocMoE: the capacity of the first step's affinities, frozen."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, layer_of, learn
from torch import Tensor

from etr.moe import MoE


def aligned() -> Tensor:
    """64 tokens, all along the first expert's block vector."""
    x = torch.zeros(64, 64)
    x[:, :16] = 1.0
    return x


def unaligned() -> Tensor:
    """64 tokens whose mean over each expert's block is 0, and so their affinities."""
    blocks = torch.randn(64, 4, 16)
    return (blocks - blocks.mean(-1, keepdim=True)).flatten(1)


def capacity(layer: MoE) -> int:
    """Tokens that an expert keeps of 64 that choose it."""
    return int(decide(layer, aligned()).selection.num_tokens_per_expert[0])


@pytest.mark.criterion
@pytest.mark.parametrize(
    ("first", "later", "tokens"),
    [(unaligned, aligned, 16), (aligned, unaligned, 18)],  # 1.0 and 1.1 of 64 / 4
)
def test_the_first_step_freezes_the_capacity(first, later, tokens) -> None:
    """The first optimizer step freezes the capacity: where affinities are 0 the bound is 1 / E
    tokens and the capacity 1.0 of the mean load, where they are large it is 1.1, and no later
    token moves it."""
    layer = layer_of("locmoe", hidden_size=64)
    assert capacity(layer) == 18
    learn(layer, first())
    assert capacity(layer) == tokens
    raw = float(layer.capacity.raw_bound)
    assert raw == pytest.approx(0.25, abs=0.01) if first is unaligned else raw > 18
    for _ in range(3):
        learn(layer, later())
    assert capacity(layer) == tokens
    assert float(layer.capacity.raw_bound) == raw
