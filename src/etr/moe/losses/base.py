"""What a loss is: a frozen config, and a pure function of what a layer did in one forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from etr.moe.affinity import without_autocast
from etr.moe.checked import check_types
from etr.moe.collector import Pool
from etr.moe.context import RoutingContext
from etr.moe.experts import ExpertParams
from etr.moe.losses.means import sum_over_group
from etr.moe.routers import RouterTraits
from etr.moe.routing import Routing, Selection
from etr.moe.topology import ExpertPlacement

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

AuxMode = Literal["micro", "ranks", "running", "previous"]

_LACKS = {
    "has_probs": "router {} has no probabilities, so the loss is undefined",
    "has_scores": "router {} has no scores, so the loss is undefined",
    "sparse_gates": "gates of router {} are not 0 where closed, so the loss is undefined",
    "has_cosine": "scores of router {} are not cosines, so the loss is undefined",
    "has_directions": "router {} has no directions of experts, so the loss is undefined",
    "tokens_choose": "in router {} experts choose, so the load is even by construction",
}
"""What a router without a fact means for a loss that needs it."""


@dataclass(frozen=True, kw_only=True)
class LossInput:
    """One forward of a layer in training, as its losses see it.

    Args:
        routing: what this rank's tokens want.
        selection: what experts keep of it.
        context: mask, placement and groups.
        choices: choices per expert of this rank's tokens, int64 [E].
        meant: number of the expert that each choice means; None where it has no weights.
        past: choices per expert in the last optimizer step, float [E]; zeros before the first.
        earlier: choices in the step's earlier micro-batches, int64 [E], or None.
        router: the router's module.
        step: optimizer steps that the layer has done, int64 [].
        layer_index: number of the layer in its model.
        pool: finds the layers of the model that hold the same experts.
        x: tokens, float [T, H], with gradient, for a loss that asks for them; else None.
        experts: weights of the experts, float32 (float64 for such tokens), with gradient, for a
            loss that asks for them; else None. Over ranks this rank's experts alone.
        first_expert: number of the first of them.
        expert_group: ranks that hold the other experts, for `whole_over_group`; None for none.
    """

    routing: Routing
    selection: Selection
    context: RoutingContext
    choices: Tensor
    meant: tuple[int | None, ...]
    past: Tensor
    earlier: Tensor | None
    router: nn.Module
    step: Tensor | int = 0
    layer_index: int = 0
    pool: Callable[[], Pool] = Pool
    x: Tensor | None = None
    experts: ExpertParams | None = None
    first_expert: int = 0
    expert_group: ProcessGroup | None = None

    @property
    def num_experts(self) -> int:
        """How many experts with weights there are, E."""
        return len(set(self.meant) - {None})

    @property
    def free(self) -> Tensor:
        """Which choices have no weights, bool [N]; they are the last ones."""
        known = sum(number is not None for number in self.meant)
        return torch.arange(len(self.meant), device=self.choices.device) >= known

    @property
    def num_open(self) -> Tensor | int:
        """Of how many choices a token may take; fewer than all where the router closes some."""
        found: Tensor | int = self.router.num_open  # type: ignore[assignment]
        return found

    def load(self, mode: AuxMode) -> Tensor:
        """Choices per expert that count as load, [E]; no gradient.

        Args:
            mode: micro: this rank's micro-batch. ranks: summed over data ranks. running: plus the
                step's earlier micro-batches. previous: the last optimizer step's; even before the
                first.
        """
        if mode == "previous":
            # Even before the first step: no gradient, whatever the ranks and micro-batches.
            return torch.where(self.past.sum() > 0, self.past, 1.0)
        if mode == "micro":
            return self.choices
        load = self.choices
        if mode == "running" and self.earlier is not None:
            load = load + self.earlier
        return sum_over_group(load, self.context.data_group)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Base of the losses: fields are options, and a call computes the loss without its weight."""

    name: ClassVar[str]
    """In `LOSSES`, and in texts."""
    key: ClassVar[str] = ""
    """In outputs, counters and metrics; empty: the name."""
    own: ClassVar[float]
    """Weight where none is given, no unit; without it one must be."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Facts of `RouterTraits` without which the loss has no meaning."""
    needs_tokens: ClassVar[bool] = False
    """Asks for `LossInput.x`."""
    needs_experts: ClassVar[bool] = False
    """Asks for `LossInput.experts`."""
    one_when_even: ClassVar[bool] = False
    """Is 1, its least value, where it takes the load for even."""

    weight: float | None = None
    """Factor of the loss, no unit. None: its own, or 0 where the router lacks what it needs."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.weight is None and not hasattr(self, "own"):
            raise ValueError(f"loss {self.name!r} needs a weight, as in {self.name}:weight=0.01")
        if self.weight is not None and not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight={self.weight} of loss {self.name!r} must be >= 0 and finite")

    @property
    def label(self) -> str:
        """Name in outputs, counters and metrics."""
        return self.key or self.name

    @property
    def needs_past(self) -> bool:
        """Whether the loss changes with what the last optimizer step was."""
        return False

    @property
    def is_mean(self) -> bool:
        """Whether the loss of a batch is the mean of the losses of its equal parts."""
        return False

    @property
    def counts_ranks(self) -> bool:
        """Whether ranks that share a batch average to the loss of one rank that has it all."""
        return True

    def lacks(self, traits: RouterTraits) -> str | None:
        """Why the loss has no meaning for a router, with ``{}`` for its name; or None."""
        missing = next((fact for fact in self.needs if not getattr(traits, fact)), None)
        return None if missing is None else _LACKS.get(missing, f"router {{}} is not {missing}")

    def weight_for(self, traits: RouterTraits, placement: ExpertPlacement | None = None) -> float:
        """Factor with a router, and with a placement of its experts."""
        if self.weight is not None:
            return self.weight
        return self.own_weight(placement) if self.lacks(traits) is None else 0.0

    def own_weight(self, placement: ExpertPlacement | None) -> float:
        """Factor where none is given, for a router that has what the loss needs."""
        return self.own

    def __call__(self, given: LossInput) -> Tensor:
        """The loss, a scalar, without its weight; see `etr.moe.losses.means` for what ranks share.

        Raises:
            ValueError: what it needs is not there.
        """
        raise NotImplementedError


def scaled_losses(
    rows: Iterable[Loss], given: LossInput, traits: RouterTraits, experts: nn.Module | None
) -> dict[str, Tensor]:
    """Losses of one forward times their weights, by label; those of weight 0 are left out.

    Args:
        rows: the layer's losses.
        given: with tokens; without weights of experts.
        traits: of the router.
        experts: a bank, which is called where a loss asks for its weights; or None.
    """
    placement = given.context.placement
    weights = [(row, row.weight_for(traits, placement)) for row in rows]

    def scaled(given: LossInput, of_experts: bool) -> dict[str, Tensor]:
        bare = replace(given, x=None)
        return {
            row.label: weight * row(given if row.needs_tokens else bare)
            for row, weight in weights
            if weight and row.needs_experts == of_experts
        }

    def inside(x: Tensor, *parts: ExpertParams) -> dict[str, Tensor]:
        if len(parts) > 1:
            raise ValueError(
                f"a loss that asks for the experts' weights sees experts of one width; there are "
                f"{len(parts)} groups of them"
            )
        (params,) = parts
        before = 0 if given.expert_group is None else dist.get_rank(given.expert_group)
        first = before * params.down.shape[0]
        return scaled(replace(given, experts=params, first_expert=first), True)

    found = scaled(given, False)
    needed = any(weight and row.needs_experts for row, weight in weights)
    if needed and experts is not None and given.x is not None:
        # Weights that FSDP shards are whole inside the experts' own call alone.
        with without_autocast(given.x):
            found |= experts(given.x, torch.promote_types(given.x.dtype, torch.float32), inside)
    return found


def even_losses(rows: Iterable[Loss], traits: RouterTraits) -> dict[str, float]:
    """Weights of the losses that are 1 where the load is even, by label."""
    weights = {row.label: row.weight_for(traits) for row in rows if row.one_when_even}
    return {label: weight for label, weight in weights.items() if weight}
