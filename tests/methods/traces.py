"""Traces that are made up, for the tests of methods that act on them."""

from __future__ import annotations

import torch
from torch import Tensor

from etr.systems import Demand


def some(seed: int, layers: int = 3, tokens: int = 40, k: int = 2, experts: int = 4) -> Demand:
    """Random distinct experts, some tokens with fewer than k."""
    generator = torch.Generator().manual_seed(seed)
    choices = torch.rand(layers, tokens, experts, generator=generator).topk(k).indices
    choices[torch.rand(layers, tokens, k, generator=generator) < 0.1] = -1
    return Demand.of(choices, torch.arange(tokens) // 8, experts)


def planted(seed: int, layers: int = 4, experts: int = 8, groups: int = 4, k: int = 1) -> Demand:
    """Tokens whose experts are of one hidden group in every layer, another one for each token.

    Which experts make a group is the same for every seed.
    """
    made = torch.Generator().manual_seed(99)
    member = torch.stack([torch.randperm(experts, generator=made) for _ in range(layers)])
    member = member.view(layers, groups, -1)  # [layer, group, place]
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(groups, (200,), generator=generator)
    order = torch.rand(layers, 200, experts // groups, generator=generator).argsort(-1)[..., :k]
    choices = member[:, group].gather(2, order)
    return Demand.of(choices, torch.arange(200) // 20, experts)


def share_between_ranks(moved: object) -> float:
    """Hops that leave a rank, of all."""
    return moved.hops_between_ranks / moved.hops  # type: ignore[attr-defined]


def ways_to_place(experts: int, ranks: int) -> list[Tensor]:
    """Every map of experts to ranks with equally many on each, int64 [E]."""
    every = torch.cartesian_prod(*[torch.arange(ranks)] * experts)
    even = [(every == rank).sum(1) == experts // ranks for rank in range(ranks)]
    return list(every[torch.stack(even).all(0)])
