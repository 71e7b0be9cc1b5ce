"""Experts that are a base and a low-rank difference each (arXiv 2602.08818)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etr.moe.checked import check_count, meanings
from etr.moe.experts.activation import GATED
from etr.moe.experts.bank import Bank, BankConfig, ExpertSizes
from etr.moe.experts.runs import numbers_of
from etr.moe.experts.uniform import Experts
from etr.moe.experts.weights import ExpertParams


@dataclass(frozen=True, kw_only=True)
class LowRank(BankConfig):
    """Experts that share a base, from which each differs by matrices of low rank."""

    name = "low_rank"
    summary = "one base for all experts, and a low-rank difference of each"
    undivided = "every expert needs the base"

    ranks: str = ""
    """Rank of each expert's difference, as runs of equal ones: ``4x8+2x0``. Empty: 1 each."""
    of: str = ""
    """Which difference each choice means, numbers joined by +: 0+1+0+2. Empty: its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers_of(self.ranks, "ranks")
        meanings(self.of, "of")

    def check(self, num_experts: int, hidden_size: int) -> None:
        ranks, of = numbers_of(self.ranks, "ranks"), meanings(self.of, "of")
        check_count(of, num_experts, f"of={self.of!r}")
        count = max(of) + 1 if of else num_experts
        if ranks and len(ranks) != count:
            where = f"{count} in of={self.of!r}" if of else f"num_experts={num_experts}"
            raise ValueError(f"ranks={self.ranks!r} names {len(ranks)} experts; there are {where}")

    def build(self, sizes: ExpertSizes) -> Bank:
        if sizes.bias:
            raise ValueError("experts='low_rank': experts with biases are not taken")
        of = meanings(self.of, "of") or list(range(sizes.num_experts))
        return LowRankExperts(sizes, numbers_of(self.ranks, "ranks") or [1] * (max(of) + 1), of)


class LowRankExperts(Experts):
    """The base has the names and shapes of one expert; R is the sum of all ranks.

    Beside it, for each matrix [O, I] of an expert (gate, up, down), ``gate_left`` [O, R] and
    ``gate_right`` [R, I], of which each expert has its columns and rows.

    Args:
        sizes: of the experts.
        ranks: of each difference.
        of: number of the difference that each choice means.
    """

    def __init__(self, sizes: ExpertSizes, ranks: list[int], of: list[int]) -> None:
        super().__init__(
            ExpertSizes(
                num_experts=1,
                hidden_size=sizes.hidden_size,
                intermediate_size=sizes.intermediate_size,
                activation=sizes.activation,
                clamp=sizes.clamp,
            )
        )
        self.add_factors(sizes, ranks, of)

    def add_factors(self, sizes: ExpertSizes, ranks: list[int], of: list[int]) -> None:
        """Make the factors, and know what they mean."""
        self.ranks, self.of = ranks, of
        wide, narrow = sizes.hidden_size, sizes.intermediate_size
        self.halves = ("gate", "up") if sizes.activation in GATED else ("up",)
        self.shapes = dict.fromkeys(self.halves, (narrow, wide)) | {"down": (wide, narrow)}
        for name, (rows, columns) in self.shapes.items():
            left, right = torch.empty(rows, sum(ranks)), torch.zeros(sum(ranks), columns)
            nn.init.normal_(left, std=columns**-0.5)
            self.register_parameter(f"{name}_left", nn.Parameter(left))
            self.register_parameter(f"{name}_right", nn.Parameter(right))

    @property
    def num_experts(self) -> int:
        return len(self.of)

    @property
    def size_of_one(self) -> float:
        """Of the matrices that run."""
        return sum(value.numel() for _, value in self.weights())

    def parameters_of_a_token(self, top_k: int) -> float:
        one_rank = sum(map(sum, self.shapes.values()))
        return self.size_of_one + one_rank * sum(sorted(self.ranks)[-top_k:])

    def params(self, dtype: torch.dtype) -> ExpertParams:
        base = super().params(dtype)
        up = torch.cat([self._differences(name, dtype) for name in self.halves], dim=1)
        return ExpertParams(
            up=base.up + up,
            down=base.down + self._differences("down", dtype),
            activation=base.activation,
            clamp=base.clamp,
        )

    def _differences(self, name: str, dtype: torch.dtype) -> Tensor:
        """Of one matrix of every expert, [E, O, I]."""
        found = self.products(name, dtype)
        return torch.stack([found[number] for number in self.of])

    def products(self, name: str, dtype: torch.dtype) -> list[Tensor]:
        """Of one matrix of each difference, [O, I]."""
        left = getattr(self, f"{name}_left").to(dtype).split(self.ranks, dim=1)
        right = getattr(self, f"{name}_right").to(dtype).split(self.ranks, dim=0)
        return [a @ b for a, b in zip(left, right, strict=True)]
