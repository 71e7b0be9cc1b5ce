"""One bank for several layers of a model (arXiv 2605.06665)."""

from __future__ import annotations

from dataclasses import dataclass, field

from etr.moe.experts.bank import Bank, BankConfig, ExpertSizes
from etr.moe.experts.uniform import Uniform


@dataclass(frozen=True, kw_only=True)
class Shared(BankConfig):
    """Consecutive MoE layers of a model choose among the same experts, each by its own router.

    A layer by itself has a bank of its own; `tie_experts` makes those of a model one.
    """

    name = "shared"
    summary = "one bank for consecutive MoE layers of a model, each with its own router"
    undivided = "layers would divide the same weights twice"

    wrapped: BankConfig = field(default_factory=Uniform)
    """The bank that they share."""
    layers: int | None = None
    """MoE layers that share one bank; None for all of the model's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"layers={self.layers} must be at least 1, or None for all")
        if isinstance(self.wrapped, Shared):
            raise ValueError("wrapped='shared': a shared bank is shared once; name another")

    def num_choices(self, num_experts: int) -> int:
        return self.wrapped.num_choices(num_experts)

    def num_weighed(self, num_experts: int) -> int | None:
        return self.wrapped.num_weighed(num_experts)

    def meant(self, num_experts: int) -> tuple[int | None, ...]:
        return self.wrapped.meant(num_experts)

    @property
    def needs(self) -> dict[str, str]:
        return self.wrapped.needs

    @property
    def choices_of_a_token(self) -> int | None:
        return self.wrapped.choices_of_a_token

    @property
    def one_width(self) -> bool:
        return self.wrapped.one_width

    def check(self, num_experts: int, hidden_size: int) -> None:
        self.wrapped.check(num_experts, hidden_size)

    def build(self, sizes: ExpertSizes) -> Bank:
        return self.wrapped.build(sizes)

    def owner(self, place: int) -> int:
        return 0 if self.layers is None else place - place % self.layers
