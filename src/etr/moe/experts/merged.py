"""Experts that were merged: several choices mean the same weights (arXiv 2310.01334)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from etr.moe.checked import check_count, meanings
from etr.moe.experts.bank import Bank, BankConfig, ExpertSizes
from etr.moe.experts.uniform import Experts
from etr.moe.experts.weights import ExpertParams
from etr.moe.rows import Index


@dataclass(frozen=True, kw_only=True)
class Merged(BankConfig):
    """Fewer equal experts than choices: several choices mean the same one."""

    name = "merged"
    summary = "equal experts, of which several choices mean the same"
    undivided = "ranks would hold choices, and not experts"

    of: str = ""
    """Which weights each choice means, numbers joined by +: 0+1+0+2. Empty: its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        meanings(self.of, "of")

    def check(self, num_experts: int, hidden_size: int) -> None:
        check_count(meanings(self.of, "of"), num_experts, f"of={self.of!r}")

    def build(self, sizes: ExpertSizes) -> Bank:
        return MergedExperts(sizes, meanings(self.of, "of") or list(range(sizes.num_experts)))


class MergedExperts(Experts):
    """A bank with weights [D, ...], of which each of E choices means one.

    Args:
        sizes: of the experts, as many as choices.
        of: number of the weights that each choice means, E of them.
    """

    def __init__(self, sizes: ExpertSizes, of: Sequence[int]) -> None:
        super().__init__(replace(sizes, num_experts=max(of) + 1))
        self.of, self.index = list(of), Index(of)

    @property
    def num_experts(self) -> int:
        """Choices."""
        return len(self.of)

    @property
    def size_of_one(self) -> float:
        return sum(value.numel() for _, value in self.weights()) / (max(self.of) + 1)

    def parameters_of_a_token(self, top_k: int) -> float:
        return self.size_of_one * min(top_k, max(self.of) + 1)

    def params(self, dtype: torch.dtype) -> ExpertParams:
        found = super().params(dtype)
        if self.of == list(range(len(self.of))):
            return found
        index = self.index.on(found.up.device)
        up_bias, down_bias = found.up_bias, found.down_bias
        return replace(
            found,
            up=found.up[index],
            down=found.down[index],
            up_bias=None if up_bias is None else up_bias[index],
            down_bias=None if down_bias is None else down_bias[index],
        )
