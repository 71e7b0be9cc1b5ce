"""Weights to weights: what a method measures, plans and makes of a checkpoint's MoE layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from etr.moe.collector import Collected
from etr.moe.config import MoEConfig
from etr.moe.experts.uniform import Uniform
from etr.moe.view import LayerView
from etr.systems.plan import Plan
from etr.table import Table

Need = Literal["outputs", "rows", "gradients", "residual", "task", "weight_gradients"]
"""What `observe` must see beyond choices: `LayerView.output`; `.rows` too; in the backward pass of
the loss, summed over tokens, `.gradient`; `.residual`; `.task`, the domain of the text, where that
is known. Or `inspect` weights with gradients."""
Stats = dict[str, Tensor]
"""What a method measures of a layer; sums over batches."""


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor to write, made when its turn comes.

    Args:
        name: key in the folder.
        shape: of the tensor.
        dtype: of the tensor.
        make: gives the tensor; called once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def then(
        self,
        change: Callable[[Tensor], Tensor],
        *,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> LazyTensor:
        """What becomes of it, made when its turn comes.

        Args:
            shape, dtype: of the result, where they change.
        """
        return replace(
            self,
            shape=self.shape if shape is None else shape,
            dtype=self.dtype if dtype is None else dtype,
            make=lambda: change(self.make()),
        )


LayerTensors = dict[str, LazyTensor]
"""Weights and state of one MoE layer, by their names in the layer's state dict."""


class Transform:
    """A frozen config that makes other layers of a checkpoint's; one row of `TRANSFORMS`.

    `etr.hf.transform` runs it: it measures where there is an `observe`, asks for one plan for all
    layers, and writes tensor after tensor what `apply` makes, with the config that `options` gives.
    """

    name: ClassVar[str]
    """In commands."""
    summary: ClassVar[str]
    """One line for `etr transform --help`."""
    needs: ClassVar[tuple[Need, ...]] = ()
    """What `observe` must see."""
    takes_norm: ClassVar[bool] = False
    """Whether `apply` is also given the weight of the norm before the layer, as ``norm.weight``."""

    @property
    def measures(self) -> bool:
        """Whether text must be run through the model before planning."""
        observes = type(self).observe is not Transform.observe
        return observes or self.probes or "weight_gradients" in self.needs

    @property
    def inspects(self) -> bool:
        """Whether the model must be read before planning, with text or without."""
        return type(self).inspect is not Transform.inspect

    @property
    def probes(self) -> bool:
        """Whether the loss of the text is measured with other weights before planning."""
        return type(self).probe is not Transform.probe

    def changes_function(self) -> str | None:
        """Why the result computes something else, dropless; None where it must compute the same."""
        return None

    def observe(self, view: LayerView) -> Stats:
        """What one forward of a layer adds to its statistics."""
        raise NotImplementedError

    def gather(self, total: Stats, more: Stats) -> Stats:
        """Statistics of a layer with those of one more forward: their sum."""
        return summed(total, more)

    def inspect(self, layer: Collected, stats: Stats) -> Stats:
        """What a layer's weights say, once all text has passed, if any.

        Where `needs` has weight_gradients, they hold those of the loss summed over tokens.

        Args:
            layer: of the model.
            stats: what was gathered of it.
        """
        raise NotImplementedError

    def probe(
        self, layers: Sequence[Collected], loss: Callable[[], float], stats: Sequence[Stats]
    ) -> list[Stats]:
        """What the loss of the text says of layers whose weights are changed in place.

        Args:
            layers: of the model, which is thrown away afterwards.
            loss: of the text as the layers stand, nats a token; runs the model over all of it.
            stats: what was gathered of each.
        """
        raise NotImplementedError

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        """What a plan does, in a line; empty where there is nothing to say."""
        return ""

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        """What to do, as values of JSON, which a person can read and change.

        Args:
            stats: of each MoE layer, summed; empty ones where nothing is measured.
            layers: their configs.
        """
        return None

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        """Refuse a plan that is damaged, or for other layers than these.

        Raises:
            ValueError: says what is wrong, with names and numbers.
        """

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        """The new tensors of one layer.

        Args:
            tensors: the old ones.
            plan: for all layers.
            place: number of the MoE layer, from 0.
        """
        raise NotImplementedError

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        """The new config of one layer."""
        return layer


SHARED = ("shared_experts.", "shared_gate.")
"""Beginnings of the names of tensors that belong to no routed expert."""


@dataclass(frozen=True, kw_only=True)
class Renumber(Transform):
    """Experts under other numbers: carries out a placement of equal counts per rank.

    Blocks of consecutive experts, which ranks hold, then are those of the plan. The router's rows,
    the experts' weights, thresholds, biases and counters all move along, so that the function stays
    the same; equal scores are broken by number, so that ties may go to another expert.
    """

    name = "renumber"
    summary = "carry out a placement of etr plan: the same function, experts under other numbers"

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        raise ValueError("transform 'renumber' carries out a placement: give the file of etr plan")

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        order = Plan.from_dict(plan).order()
        sizes = {(len(layers), layer.num_experts) for layer in layers}
        if sizes != {tuple(order.shape)}:
            theirs = " and ".join(f"{n} layers of {e} experts" for n, e in sorted(sizes))
            raise ValueError(
                f"the plan is for {order.shape[0]} layers of {order.shape[1]} experts, and the "
                f"model has {theirs or 'no MoE layer'}"
            )
        for place, (row, layer) in enumerate(zip(order, layers, strict=True)):
            router, traits = layer.router_config, layer.router_config.traits
            if not isinstance(layer.bank_config, Uniform):
                raise ValueError(
                    f"experts={layer.bank_config.name!r}: only uniform experts can be renumbered"
                )
            if traits.numbered:
                raise ValueError(
                    f"router {router.name!r} sends tokens to experts by their numbers (as it is "
                    "set): they cannot be renumbered"
                )
            groups = (row // (layer.num_experts // traits.num_groups)).view(traits.num_groups, -1)
            if (groups != groups[:, :1]).any():
                raise ValueError(
                    f"the plan tears groups of layer {place} apart: tokens choose among "
                    f"{traits.num_groups} groups of neighbouring experts"
                )

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        order = Plan.from_dict(plan).order()[place]
        return {
            name: tensor.then(lambda value: value[order])
            if holds_experts(name, tensor.shape, len(order))
            else tensor
            for name, tensor in tensors.items()
        }


def holds_experts(name: str, shape: Sequence[int], num_experts: int) -> bool:
    """Whether a tensor of a layer has a row for each expert: all that begin with E do.

    What is a router's own for other reasons (a direction for each dimension, say) is `numbered`.
    """
    return shape[:1] == (num_experts,) and not name.startswith(SHARED)


def largest(total: Stats, more: Mapping[str, Tensor]) -> Stats:
    """The larger of a layer's statistics and those of one more forward, element by element."""
    return {
        **total,
        **{k: torch.maximum(v, total[k]) if k in total else v for k, v in more.items()},
    }


TRANSFORMS: Table[Transform] = Table("transform", (Renumber,))
"""Transforms by name."""


def summed(total: Stats, more: Mapping[str, Tensor]) -> Stats:
    """Statistics of a layer with those of one more forward."""
    return {**total, **{k: v + total[k] if k in total else v for k, v in more.items()}}
