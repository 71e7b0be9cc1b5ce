"""Null experts: further choices that run nothing (arXiv 2406.13233, 2410.07348)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from etr.moe.experts.bank import BankConfig, ExpertSizes
from etr.moe.experts.uniform import Experts
from etr.moe.routing import Routing, Selection

Kind = Literal["zero", "copy", "constant"]


@dataclass(frozen=True, kw_only=True)
class Nulls(BankConfig):
    """E equal experts, and choices beside them that cost nothing."""

    name = "nulls"
    summary = "equal experts, and further choices that add nothing, the token or a learned vector"

    count: int = 1
    """Choices without weights, numbered after the experts."""
    kind: Kind = "zero"
    """What one of them adds, times its combine weight: nothing, the token itself, or a vector that
    it learns."""
    weighed: bool | None = None
    """Normalised weights are divided by the gates of all choices; with False by those of experts
    with weights alone. None: all, unless nulls add nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 0:
            raise ValueError(f"count={self.count} null experts must be at least 0")
        if self.weighed is False and self.kind != "zero":
            raise ValueError(
                f"weighed=False with kind={self.kind!r}: what adds something must be weighed like "
                "the rest; use weighed=True or kind='zero'"
            )

    def num_choices(self, num_experts: int) -> int:
        return num_experts + self.count

    def num_weighed(self, num_experts: int) -> int | None:
        weighed = self.kind != "zero" if self.weighed is None else self.weighed
        return None if weighed else num_experts

    def build(self, sizes: ExpertSizes) -> NullExperts:
        return NullExperts(sizes, self.count, self.kind)


class NullExperts(Experts):
    """``constants`` [count, H] beside the experts' weights, where nulls are constants.

    Args:
        sizes: of the experts with weights.
        count: further choices.
        kind: what they add.
    """

    constants: nn.Parameter | None

    def __init__(self, sizes: ExpertSizes, count: int, kind: Kind) -> None:
        super().__init__(sizes)
        self.count, self.kind = count, kind
        constants = kind == "constant" and count > 0
        value = nn.Parameter(torch.empty(count, sizes.hidden_size)) if constants else None
        self.register_parameter("constants", value)
        self.reset_parameters()

    def idle(self, x: Tensor, routing: Routing, selection: Selection) -> Tensor | None:
        if self.kind == "zero" or not self.count:
            return None
        weight = weights_from(routing, selection, self.num_experts).to(x.dtype)
        if self.kind == "copy":
            return x * weight.sum(1, keepdim=True)
        assert self.constants is not None
        return weight @ self.constants.to(x.dtype)


def weights_from(routing: Routing, selection: Selection, first: int) -> Tensor:
    """Combine weights of the choices from number `first` on, by token, [T, choices]."""
    count = routing.num_experts - first
    number = routing.token * count + routing.expert - first
    mine = selection.kept & (routing.expert >= first)
    size = routing.num_tokens * count
    weight = selection.combine_weight.new_zeros(size + 1)
    weight = weight.index_add(0, torch.where(mine, number, size), selection.combine_weight)
    return weight[:size].view(routing.num_tokens, count)
