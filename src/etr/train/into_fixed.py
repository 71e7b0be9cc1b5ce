"""From learned orthonormal directions to fixed blocks, while the whole model trains.

The fixed frame (arXiv 2406.00023, eq. 3) gives expert e the e-th block of dimensions and has no
parameters: a router cannot be taught old choices in it. So the model has to follow. The directions
turn from the learned ones to the blocks over the first part of the training, and stay there for the
rest; then the frame is changed, which changes no output any more.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from etr.data import Batch
from etr.hf import EtrForCausalLM
from etr.hf.layer_options import store_options
from etr.moe import MoE, moe_layers, reset_states
from etr.moe.affinity import block_width, router_dtype
from etr.moe.polar import polar_factor
from etr.moe.routers.etr import EtrRouter
from etr.train.briefly import train_briefly
from etr.train.config import OptimizerConfig
from etr.train.model import widen_weights

T = TypeVar("T")

MOVING_SHARE = 0.8
"""Share of the steps after which the directions have arrived."""


def block_directions(num_experts: int, hidden_size: int) -> Tensor:
    """Directions of the fixed frame as a matrix.

    Returns:
        float64 [E, H]: row e is ``1 / sqrt(H / E)`` on block e and 0 elsewhere.
    Raises:
        ValueError: H is not divisible by E.
    """
    width = block_width(hidden_size, num_experts)
    rows = torch.eye(num_experts, dtype=torch.float64).repeat_interleave(width, dim=1)
    return rows / math.sqrt(width)


def check_blocks(model: EtrForCausalLM) -> None:
    """Refuse a model whose width cannot be divided into blocks.

    Raises:
        ValueError: hidden_size is not divisible by the number of experts.
    """
    sizes = model.config.moe_config
    if sizes.hidden_size % sizes.num_experts:
        raise ValueError(
            f"hidden_size={sizes.hidden_size} is not divisible by num_experts={sizes.num_experts}: "
            "in the fixed frame every expert has an equal block of dimensions; leave into_fixed at "
            "0 for this model"
        )


@torch.no_grad()
def number_experts(model: EtrForCausalLM) -> list[Tensor]:
    """Number the experts of each layer anew, in place, so that directions are near their blocks.

    Weights go with their expert, so the model computes what it did; thresholds start anew.

    Args:
        model: with routers of frame `orthonormal`.
    Returns:
        For each layer, the old number of each expert, int64 [E]: the assignment with the largest
        sum of cosines of directions and blocks.
    Raises:
        ValueError: another frame, or a width that blocks do not divide.
    """
    orders = []
    for layer in moe_layers(model):
        weight = _learned(layer)
        cosine = block_directions(*weight.shape).to(weight.device) @ polar_factor(weight.double()).T
        order = torch.as_tensor(linear_sum_assignment(cosine.cpu().numpy(), maximize=True)[1])
        order = order.to(weight.device)
        for value in (weight, *layer.experts.parameters()):
            value.copy_(value[order])
        reset_states(layer)
        orders.append(order)
    return orders


def into_fixed(
    model: EtrForCausalLM,
    batches: Sequence[Batch],
    optimizer: OptimizerConfig,
    measure: Callable[[str, EtrForCausalLM], T],
    on_step: Callable[[int, str], None] = lambda step, words: None,
) -> tuple[list[T], list[float]]:
    """Train `model` into the fixed frame, in place, and first a copy of it as it is.

    The copy sees the same batches in the same order, with its directions where they are, so that
    what more training gains is not taken for what the frame gains.

    Args:
        model: with routers of frame `orthonormal`.
        batches: text, one a step, at least one.
        optimizer: of both.
        measure: called with "trained" and the copy, then with "fixed" and the model.
        on_step: called with the number of the step, from 1 over both, and its loss in words.
    Returns:
        What `measure` returned, and the model's cross-entropy at each step, nats per token.
    Raises:
        ValueError, TrainingDiverged: as `train_on`.
    """

    def train(name: str, model: EtrForCausalLM, done: int) -> list[float]:
        return train_on(
            model,
            batches,
            optimizer,
            to_blocks=name == "fixed",
            on_step=lambda step, loss: on_step(done + step, f"{name} {loss:.3f}"),
        )

    twin = copy.deepcopy(model)
    train("trained", twin, 0)
    trained = measure("trained", twin)
    del twin
    losses = train("fixed", model, len(batches))
    fix_frame(model)
    return [trained, measure("fixed", model)], losses


def train_on(
    model: EtrForCausalLM,
    batches: Sequence[Batch],
    config: OptimizerConfig,
    *,
    to_blocks: bool,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train everything but the directions on the language-model loss, one batch a step.

    Args:
        model: with routers of frame `orthonormal`; trained in place, see `train_briefly`.
        batches, config, on_step: see `train_briefly`.
        to_blocks: turn the directions to the fixed blocks, where they arrive after `MOVING_SHARE`
            of the steps; otherwise they stay.
    Returns:
        Cross-entropy of each step, nats per token.
    Raises:
        ValueError: another frame, or a width that blocks do not divide.
        TrainingDiverged: the loss became NaN or infinite.
    """
    widen_weights(model)
    with _directions_of(model) as turns:

        def before_step(step: int) -> None:
            for turn in turns if to_blocks else ():
                turn.set(arrived(step, len(batches)))

        return train_briefly(model, batches, config, before_step=before_step, on_step=on_step)


def arrived(step: int, steps: int) -> float:
    """Share of the way to the blocks at step `step` (from 1) of `steps`; 1 at the last one."""
    return min(1.0, step / max(1, round(MOVING_SHARE * steps)))


@torch.no_grad()
def fix_frame(model: EtrForCausalLM) -> None:
    """Give the layers of `model` the fixed frame, in place; directions are thrown away.

    Where they were the blocks, outputs stay what they were up to rounding. The temperature stays,
    learned or not, and so do thresholds.

    Args:
        model: with routers of frame `orthonormal`.
    Raises:
        ValueError: another frame, or a width that blocks do not divide.
    """
    for layer in moe_layers(model):
        _learned(layer)  # another frame is refused
        config: Any = layer.router.config
        layer.reconfigure(router=dataclasses.replace(config, frame="fixed"))
    store_options(model)


class _Turn:
    """A layer's directions on their way from the learned ones to the blocks."""

    def __init__(self, layer: MoE) -> None:
        self.weight = _learned(layer)
        self._start = polar_factor(router_dtype(self.weight.detach()))
        self._end = block_directions(*self.weight.shape).to(self._start)

    @torch.no_grad()
    def set(self, share: float) -> None:
        """Go `share` of the way; the router takes the polar factor of what is written."""
        self.weight.copy_(torch.lerp(self._start, self._end, share))


@contextmanager
def _directions_of(model: EtrForCausalLM) -> Iterator[list[_Turn]]:
    """Take the directions of all layers out of training while the block runs."""
    turns = [_Turn(layer) for layer in moe_layers(model)]
    for turn in turns:
        turn.weight.requires_grad_(False)
    try:
        yield turns
    finally:
        for turn in turns:
            turn.weight.requires_grad_(True)


def _learned(layer: MoE) -> nn.Parameter:
    """The weight [E, H] behind a layer's directions."""
    config = layer.router.config
    if not isinstance(config, EtrRouter) or config.frame != "orthonormal":
        raise ValueError(
            f"router {config.name!r} has no orthonormal directions to turn; give a model whose "
            "routers have frame='orthonormal'"
        )
    return layer.router.get_parameter("weight")
