"""Equal experts: what a token chooses is what runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from etr.moe.experts.bank import Bank, BankConfig, ExpertSizes
from etr.moe.experts.weights import ExpertWeights


@dataclass(frozen=True, kw_only=True)
class Uniform(BankConfig):
    """E equal experts, each with weights."""

    name = "uniform"
    summary = "equal experts, each with weights"

    def build(self, sizes: ExpertSizes) -> Bank:
        return Experts(sizes)


class Experts(ExpertWeights, Bank):
    """A bank that is its only part, so that parameters have no longer names than they need."""

    def __init__(self, sizes: ExpertSizes) -> None:
        super().__init__(
            sizes.num_experts,
            sizes.hidden_size,
            sizes.intermediate_size,
            sizes.activation,
            sizes.bias,
            sizes.clamp,
        )

    @property
    def parts(self) -> Sequence[ExpertWeights]:
        return (self,)

    def whole(self) -> list[nn.Parameter]:
        own = {id(value) for _, value in self.weights()}
        return [value for value in self.parameters(recurse=False) if id(value) not in own]
