"""Collecting losses and statistics of one forward, and handing them to the optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from etr.moe.loss_scale import Attached, LossScale
from etr.moe.moved import moved
from etr.moe.routing import MoEOutput
from etr.moe.stats import add_stats
from etr.moe.unlearned import Unlearned

T = TypeVar("T")
__getattr__ = moved(__name__, {"moe_layers": "etr.moe.layers"})


class Collected(nn.Module):
    """What is collected from: all that is known here of a MoE layer.

    Args:
        layer_index: number of this MoE layer in its model.
    """

    def __init__(self, layer_index: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.collector: Collector | None = None
        self.pending: dict[str, Tensor] = {}
        self.attachment: Attached | None = None
        self.unlearned = Unlearned()

    @property
    def loss_scale(self) -> LossScale | None:
        """How the main loss is scaled, as whoever attached the layer says."""
        return None if self.attachment is None else self.attachment.loss_scale


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Layers of a model that hold the same experts, as one of them sees it during a forward.

    Args:
        count: how many layers there are.
        place: number of this one among them.
        notes: what losses noted, by their name and the place of the layer.
    """

    count: int = 1
    place: int = 0
    notes: dict[str, dict[int, Any]] = field(default_factory=dict)

    def before(self, name: str, value: T) -> list[T]:
        """What loss `name` noted of layers that ran before this one; `value` is for those after it.

        The same in the forward and where activations are computed again in the backward pass: a
        layer keeps its turn.
        """
        known = self.notes.setdefault(name, {})
        known.setdefault(self.place, value)
        return [known[place] for place in takewhile(lambda place: place != self.place, known)]


class Collector:
    """Receives what the MoE layers of a model return during one forward of that model.

    It closes when the model's forward returns, so that activation recomputation in the backward
    pass cannot count twice. On closing, the counters of layers in training are added to their
    `pending` counters, which `after_step` consumes.

        with Collector(model) as collector:
            output = model(batch)
        loss = task_loss + collector.loss()

    Args:
        model: model whose layers are collected from; a context's `collector` field needs no more.
        ambient: also reach layers that are called without a context.
    """

    def __init__(self, model: nn.Module, *, ambient: bool = True) -> None:
        self.layers = _collected_in(model)
        # Choices of the step's earlier micro-batches, as they are now: recomputation in the
        # backward pass must see the same.
        self.earlier = [layer.pending.get("num_choices_per_expert") for layer in self.layers]
        self.is_open = True
        self._notes: dict[nn.Module | None, dict[str, dict[int, Any]]] = {}
        self._ambient = ambient
        self._outer: list[Collector | None] = []
        self._grad_enabled = torch.is_grad_enabled()
        self._entries: list[tuple[Collected, dict[str, Tensor], Mapping[str, Tensor]]] = []
        self._learned: list[tuple[Collected, Mapping[str, Tensor]]] = []

    def __enter__(self) -> Collector:
        if self._ambient:
            self._outer = [layer.collector for layer in self.layers]
            for layer in self.layers:
                layer.collector = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(commit=kind is None)
        for layer, outer in zip(self.layers, self._outer, strict=False):
            # An enclosing collector goes on. Otherwise this closed one stays, for recomputation.
            if outer is not None and outer.is_open:
                layer.collector = outer

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copied or saved layer is not collected from, and must not drag a graph along.
        return type(None), ()

    def add(self, layer: Collected, output: MoEOutput, *, learns: bool) -> None:
        """Take in one layer's output, unless closed.

        Args:
            layer: the layer.
            output: of one call.
            learns: its counters are for `after_step`, see `MoE.learns_from`.
        Raises:
            ValueError: the layer ran without gradients inside a forward that has them, as
                reentrant activation checkpointing does: its losses would silently be lost.
        """
        if self.is_open:
            if output.losses and self._grad_enabled and not torch.is_grad_enabled():
                raise ValueError(
                    f"MoE layer {layer.layer_index} runs under no_grad inside a training forward, "
                    "so its losses would have no gradient; use activation checkpointing with "
                    "use_reentrant=False, or put the layer in eval mode"
                )
            self._entries.append((layer, output.losses, output.stats))
            if learns:
                self._learned.append((layer, output.stats))

    def earlier_choices(self, layer: Collected) -> Tensor | None:
        """Choices of `layer` in the step's earlier micro-batches, int64 [E], or None."""
        for known, choices in zip(self.layers, self.earlier, strict=True):
            if known is layer:
                return choices
        return None

    def pool(self, layer: Collected) -> Pool:
        """The layers that hold the same experts as `layer`."""
        bank = layer._modules.get("experts")
        same = [one for one in self.layers if one._modules.get("experts") is bank]
        if bank is None or layer not in same:
            return Pool()
        notes = self._notes.setdefault(bank, {})
        return Pool(count=len(same), place=same.index(layer), notes=notes)

    def close(self, *, commit: bool = True) -> None:
        """Stop receiving; with `commit`, add the counters to the layers' pending ones."""
        if not self.is_open:
            return
        self.is_open = False
        if commit and torch.is_grad_enabled():
            for layer, stats in self._learned:
                layer.pending = add_stats(layer.pending, stats)

    def losses(self) -> dict[str, Tensor]:
        """Mean over layers of each loss, by name."""
        found = [losses for _, losses, _ in self._entries]
        names = {name for losses in found for name in losses}
        return {
            name: torch.stack([x[name] for x in found if name in x]).sum() / len(found)
            for name in sorted(names)
        }

    def loss(self) -> Tensor | float:
        """Sum of `losses`: add it to the task's loss. 0.0 where no layer has a loss."""
        return sum(self.losses().values(), start=0.0)

    def stats(self) -> list[Mapping[str, Tensor]]:
        """Counters of each layer's forward, in order of execution."""
        return [stats for _, _, stats in self._entries]


def _collected_in(model: nn.Module) -> list[Collected]:
    """The layers of a model in order.

    Every forward asks for them, also of one token: `modules()` takes several times as long, and
    would look into the layers as well, of which further inner steps alone are layers.
    """
    seen: set[nn.Module] = set()
    found: list[Collected] = []

    def walk(module: nn.Module) -> None:
        seen.add(module)
        children = module._modules
        if isinstance(module, Collected):
            found.append(module)
            children = {"later": children.get("later")}  # inner steps
        for child in children.values():
            if child is not None and child not in seen:
                walk(child)

    walk(model)
    return found
