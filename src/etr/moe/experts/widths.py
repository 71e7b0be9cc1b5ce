"""Experts of unequal widths (arXiv 2408.10681)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import nn

from etr.moe.experts.bank import Bank, BankConfig, ExpertSizes
from etr.moe.experts.runs import numbers_of
from etr.moe.experts.weights import ExpertWeights


@dataclass(frozen=True, kw_only=True)
class Widths(BankConfig):
    """Experts of several widths; neighbours of one width run together."""

    name = "widths"
    summary = "experts of unequal widths, neighbours of one width together"
    undivided = "ranks would hold unequal experts"

    widths: str = ""
    """Width inside each expert, as runs of equal ones: ``4x64+2x128+256``. An expert of width 0
    adds nothing. Empty: all alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.of(0)

    def of(self, default: int) -> list[int]:
        """Width inside each expert; a single `default` where none are named.

        Raises:
            ValueError: the text cannot be read.
        """
        return numbers_of(self.widths, "widths") or [default]

    @property
    def one_width(self) -> bool:
        return len(set(self.of(0))) == 1

    def check(self, num_experts: int, hidden_size: int) -> None:
        if self.widths and len(self.of(0)) != num_experts:
            raise ValueError(
                f"widths={self.widths!r} names {len(self.of(0))} experts; there are "
                f"num_experts={num_experts}"
            )

    def build(self, sizes: ExpertSizes) -> Bank:
        widths = self.of(sizes.intermediate_size)
        return MixedExperts(sizes, widths if self.widths else widths * sizes.num_experts)


class MixedExperts(Bank):
    """Each run of experts of one width in a module of its own, ``groups.N``.

    Args:
        sizes: of the experts, but for their width.
        widths: of each expert.
    """

    def __init__(self, sizes: ExpertSizes, widths: Sequence[int]) -> None:
        super().__init__()
        options = (sizes.activation, sizes.bias, sizes.clamp)
        self.groups = nn.ModuleList(
            ExpertWeights(len(list(run)), sizes.hidden_size, width, *options)
            for width, run in groupby(widths)
        )

    @property
    def parts(self) -> Sequence[ExpertWeights]:
        return list(self.groups)  # type: ignore[arg-type]

    @property
    def num_experts(self) -> int:
        """Experts of all widths."""
        return sum(part.num_experts for part in self.parts)
