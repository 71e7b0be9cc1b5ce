"""What every bank is: which weights a chosen expert means.

Routers, capacities, losses, counters and traces number choices; dispatch and experts see what
`plan` makes of them: pairs of experts that have weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from etr.moe.checked import check_types
from etr.moe.context import RoutingContext
from etr.moe.experts.activation import CLAMP, Activation, Clamp
from etr.moe.experts.backends import EXPERT_BACKENDS
from etr.moe.experts.weights import ExpertParams, ExpertWeights
from etr.moe.routing import Routing, Selection

Dispatch: TypeAlias = Callable[[Tensor, Routing, Selection, ExpertParams], Tensor]
"""Dispatch, experts and combine: tokens [T, H], pairs over the given experts, their weights."""


@dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """Sizes of a layer's routed experts, see `ExpertWeights`."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation
    bias: bool = False
    clamp: Clamp = CLAMP


@dataclass(frozen=True, kw_only=True)
class BankConfig:
    """Base of the configs of banks; fields are options, as in ``name:option=value``."""

    name: ClassVar[str]
    summary: ClassVar[str]
    undivided: ClassVar[str | None] = None
    """Why ranks cannot divide it among them; completes a sentence. None: they can."""
    of_gates: ClassVar[str | None] = None
    """Why combine weights must be the router's gates, as they are; completes a sentence. None:
    they may be normalised and scaled."""
    runs_itself: ClassVar[str | None] = None
    """Why neither a backend nor a dispatcher has a part in it; completes a sentence. None: they
    have."""

    def __post_init__(self) -> None:
        check_types(self)

    def num_choices(self, num_experts: int) -> int:
        """How many experts the router scores, where `num_experts` have weights."""
        return num_experts

    def num_weighed(self, num_experts: int) -> int | None:
        """Of how many choices, the first, normalisation sums the gates; None for all."""
        return None

    def meant(self, num_experts: int) -> tuple[int | None, ...]:
        """Number of the expert that each choice means; None where it has no weights, at the end.

        Those that mean something go through all experts in order, perhaps several times.
        """
        choices = range(self.num_choices(num_experts))
        return tuple(number if number < num_experts else None for number in choices)

    @property
    def needs(self) -> dict[str, str]:
        """Facts of `RouterTraits` without which it does not work, and what it does with each."""
        return {}

    @property
    def ternary(self) -> int | None:
        """Null choices, where every expert has two choices before them, one of each sign."""
        return None

    @property
    def choices_of_a_token(self) -> int | None:
        """How many choices every token must make; None for any number."""
        return None

    @property
    def one_width(self) -> bool:
        """Whether all experts have the same width, as losses that see their weights ask."""
        return True

    def check(self, num_experts: int, hidden_size: int) -> None:
        """Refuse sizes that it cannot work with.

        Raises:
            ValueError: names the option, its value and what would be right.
        """

    def build(self, sizes: ExpertSizes) -> Bank:
        """Make the bank's module."""
        raise NotImplementedError

    def owner(self, place: int) -> int:
        """Which MoE layer's bank the model's layer number `place` uses; its own by default."""
        return place


class Bank(nn.Module):
    """Base of the banks."""

    backend: ClassVar[str | None] = None
    """What "auto" means for experts that are not padded; None: the device's own rule."""
    counted: ClassVar[tuple[str, ...]] = ()
    """Names of its `counters`."""

    @property
    def parts(self) -> Sequence[ExpertWeights]:
        """Experts of equal shape, which run together; experts are numbered through the parts."""
        raise NotImplementedError

    @property
    def sizes(self) -> list[float]:
        """Weights of each expert, numbered through the parts."""
        return [part.size_of_one for part in self.parts for _ in range(part.num_experts)]

    @property
    def flops_of_any_token(self) -> float:
        """Operations of a forward pass that every token costs, whatever it chose."""
        return 0.0

    def whole(self) -> list[nn.Parameter]:
        """Parameters beside the experts' weights, which every rank holds whole."""
        return []

    def plan(self, routing: Routing, selection: Selection) -> list[tuple[Routing, Selection]]:
        """The pairs of each part's experts, numbered from 0 in the part; all others are unused."""
        found, start = [], 0
        for part in self.parts:
            stop = start + part.num_experts
            found.append(pairs_of(routing, selection, start, stop))
            start = stop
        return found

    def idle(self, x: Tensor, routing: Routing, selection: Selection) -> Tensor | None:
        """What choices that do not run add to tokens x [T, H], [T, H]; None for nothing."""
        return None

    def forward(self, x: Tensor, dtype: torch.dtype, run: Callable[..., Any]) -> Any:
        """``run(x, *params)`` with the parts' weights, which FSDP has whole inside of this call."""
        return run(x, *(part.params(dtype) for part in self.parts))

    def run(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        params: Sequence[ExpertParams],
        dispatch: Dispatch,
    ) -> Tensor:
        """What tokens x [T, H] get, [T, H]; to be called inside of `forward`.

        Args:
            x: tokens, in the dtype of the computation.
            routing, selection: over choices.
            params: of each part.
            dispatch: runs the pairs of one part.
        """
        y = self.idle(x, routing, selection)
        for weights, pairs in zip(params, self.plan(routing, selection), strict=True):
            if not (weights.down.numel() or weights.down_bias is not None):
                continue  # experts of width 0
            found = dispatch(x, *pairs, weights)
            y = found if y is None else y + found
        return x * 0.0 if y is None else y

    def losses(
        self, x: Tensor, routing: Routing, selection: Selection, context: RoutingContext
    ) -> dict[str, Tensor]:
        """What it adds to the loss in training, scaled, by label.

        Args:
            x, routing, selection: as in `run`.
            context: of the call.
        """
        return {}

    def counters(self, x: Tensor, routing: Routing, selection: Selection) -> dict[str, Tensor]:
        """What a forward counts beside its pairs: sums over kept pairs, by the names in `counted`.

        Args: as `run`.
        """
        return {}

    def output_sums(
        self,
        x: Tensor,
        routing: Routing,
        selection: Selection,
        params: Sequence[ExpertParams],
    ) -> Tensor:
        """Sums of each expert's output over the tokens that it runs for, without weights, [E, H].

        Args: as `run`.
        """
        found = []
        for weights, (pairs, kept) in zip(params, self.plan(routing, selection), strict=True):
            order = torch.where(kept.kept, pairs.expert, pairs.num_experts).argsort(stable=True)
            order = order[: int(kept.num_tokens_per_expert.sum())]
            rows = x[pairs.token[order]].to(weights.up.dtype)
            rows = EXPERT_BACKENDS["loop"].run(rows, kept.num_tokens_per_expert, weights)
            sums = rows.new_zeros(pairs.num_experts, rows.shape[1])
            found.append(sums.index_add(0, pairs.expert[order], rows))
        return torch.cat(found)

    def flops(self, num_tokens_per_expert: Tensor) -> Tensor:
        """Floating-point operations of a forward pass, a multiply-add counting as two.

        Args:
            num_tokens_per_expert: kept pairs of each choice, int64 [num_choices].
        Returns:
            float64 []; of choices that do not run see `flops_of_any_token`.
        """
        counts = num_tokens_per_expert.cpu().double()
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        return 2 * (counts[: len(sizes)] * sizes).sum()

    def parameters_of_a_token(self, top_k: int) -> float:
        """Most parameters that the `top_k` choices of a token mean; what is `whole` counts too."""
        return sum(sorted(self.sizes)[-top_k:]) + sum(value.numel() for value in self.whole())


def pairs_of(
    routing: Routing, selection: Selection, start: int, stop: int
) -> tuple[Routing, Selection]:
    """The pairs of experts `start` to `stop`, numbered from 0; all others are unused."""
    if (start, stop) == (0, routing.num_experts):
        return routing, selection
    inside = (routing.expert >= start) & (routing.expert < stop)
    pairs = replace(
        routing,
        expert=torch.where(inside, routing.expert - start, stop - start),
        num_experts=stop - start,
        scores=None,
        logits=None,
        probs=None,
    )
    kept = selection.kept & inside
    return pairs, replace(
        selection,
        kept=kept,
        bounds=selection.bounds[start : stop + 1],
        in_order=kept[selection.order],
        combine_weight=torch.where(inside, selection.combine_weight, 0.0),
        num_tokens_per_expert=selection.num_tokens_per_expert[start:stop],
    )
