"""Whoever learns once per optimizer step from what a layer's forwards counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from etr.moe.routing import Kept, Routing
from etr.moe.state import GlobalState


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One forward in training.

    Args:
        routing: what this rank's tokens want.
        kept: what experts keep of it.
        output_sums: sums of each expert's output over the tokens that it ran for, without weights,
            float [E, H] without gradient; runs the experts again. None where there are none to ask.
    """

    routing: Routing
    kept: Kept
    output_sums: Callable[[], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step.

    Args:
        counters: of the layer, by name, summed over micro-batches and ranks; those of all layers
            that hold the learner.
        layers: those of every layer of the model that ran, in its order, for what layers share.
        affinity_p99: 99th percentile of the step's chosen scores, float32 [].
        number: optimizer steps that the layer has done, with this one, int64 [].
    """

    counters: dict[str, Tensor]
    layers: Sequence[dict[str, Tensor]]
    affinity_p99: Tensor
    number: Tensor


class Learner(GlobalState):
    """Base of the learners: modules whose state moves once per optimizer step, without gradient.

    A layer asks its own in the order of `MoE.learners`; one that holds another asks it itself.
    """

    @property
    def observes_choosers(self) -> bool:
        """Whether `observe` must see every chooser of an expert, those of other ranks too."""
        return False

    @property
    def moves(self) -> bool:
        """Whether anything changes from step to step."""
        return any(isinstance(m, GlobalState) and m.has_state for m in self.modules())

    def observe(self, seen: Seen) -> dict[str, Tensor]:
        """Counters that `after_step` needs, summable over micro-batches and ranks."""
        return {}

    def after_step(self, step: Step) -> None:
        """Learn from one optimizer step."""

    def set_progress(self, progress: float) -> None:
        """Learn the fraction of optimizer steps done, in [0, 1]."""


class LayerState(Learner):
    """Optimizer steps that a layer has done, and its load in the last one."""

    step: Tensor
    previous_load: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_state("step", (), 0, torch.int64)
        self.register_state("previous_load", (num_experts,), 0.0)

    def after_step(self, step: Step) -> None:
        self.previous_load.copy_(step.counters["num_choices_per_expert"])
        self.step += 1


def learners_in(module: nn.Module | None) -> list[Learner]:
    """Learners inside `module` that no other one of them holds; none in None."""
    if module is None:
        return []
    if isinstance(module, Learner):
        return [module]
    return [learner for child in module.children() for learner in learners_in(child)]
