"""What stands in for an expert that drops a token: a vector and a small map, one for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etr.moe.experts.bank import BankConfig, ExpertSizes
from etr.moe.experts.uniform import Experts
from etr.moe.routing import Routing, Selection


@dataclass(frozen=True, kw_only=True)
class StandIn(BankConfig):
    """E equal experts; what they drop of a token's choices gets a cheap answer instead of none.

    A token x whose dropped choices have gates of sum d gets d (b + B A x) beside what its experts
    make, with b, A [rank, H] and B [H, rank] learned and shared by all experts; b and B are 0 at
    first. Every token costs the map, dropped or not.
    """

    name = "stand_in"
    summary = "equal experts; a vector and a map of low rank stand in for those that drop a token"

    rank: int = 16
    """Rank of the map; 0 for the vector alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank={self.rank} of what stands in must be at least 0")

    def build(self, sizes: ExpertSizes) -> StandInExperts:
        return StandInExperts(sizes, self.rank)


class StandInMap(nn.Module):
    """``bias`` + ``up`` ``down`` x: a vector [H], and matrices [H, rank] and [rank, H].

    Args:
        hidden_size: H.
        rank: of the map.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, hidden_size))
        self.up = nn.Parameter(torch.empty(hidden_size, rank))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Nothing stands in at first."""
        if self.down.numel():
            nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        nn.init.zeros_(self.up)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.to(x.dtype)
        if not len(self.down):
            return bias.expand_as(x)
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype), bias)


class StandInExperts(Experts):
    """``stand_in`` beside the experts' weights.

    Args:
        sizes: of the experts.
        rank: of the map.
    """

    def __init__(self, sizes: ExpertSizes, rank: int) -> None:
        super().__init__(sizes)
        self.stand_in = StandInMap(sizes.hidden_size, rank)

    def whole(self) -> list[nn.Parameter]:
        return [*super().whole(), *self.stand_in.parameters()]

    @property
    def flops_of_any_token(self) -> float:
        return 2.0 * (self.stand_in.down.numel() + self.stand_in.up.numel())

    def idle(self, x: Tensor, routing: Routing, selection: Selection) -> Tensor:
        gone = routing.valid & ~selection.kept
        weight = routing.by_token(torch.where(gone, routing.gate, 0.0)).sum(1, keepdim=True)
        found: Tensor = self.stand_in(x)
        return found * weight.to(x.dtype)
