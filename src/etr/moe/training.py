"""Connecting MoE layers to an optimizer: progress, and what is learned once per step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from etr.moe.collector import Collector
from etr.moe.layers import moe_layers
from etr.moe.learner import Learner, Step
from etr.moe.loss_scale import Attached, LossScale
from etr.moe.notice import warn
from etr.moe.stats import add_stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer


def set_progress(model: nn.Module, progress: float) -> None:
    """Tell the capacity schedules of `model` how far training is.

    Args:
        progress: fraction of optimizer steps done, in [0, 1].
    Raises:
        ValueError: progress outside [0, 1].
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress={progress} must lie in [0, 1]: the fraction of steps done")
    for layer in moe_layers(model):
        for learner in layer.learners():
            learner.set_progress(progress)


@torch.no_grad()
def after_step(model: nn.Module, group: ProcessGroup | None = None) -> list[dict[str, Tensor]]:
    """Consume the counters of one optimizer step: call once after each `optimizer.step()`.

    Thresholds, capacities and the load of the balance loss learn from them. `attach` calls this
    by itself.

    Args:
        group: ranks over which the counters are summed; every layer must have run in training on
            each of them, if only on no tokens.
    Returns:
        Counters of each MoE layer, summed over micro-batches and ranks; empty for a layer that
        did not run in training since the last call.
    """
    layers, found = moe_layers(model), _taken(model, group)
    ran = [stats for stats in found if stats]
    learned: dict[Learner, list[Step]] = {}  # layers that share experts share what these learn
    for layer, stats in zip(layers, found, strict=True):
        layer.unlearned.learned()
        if stats:
            p99, number = layer.calibration.affinity_p99, layer.state.step + 1
            step = Step(counters=stats, layers=ran, affinity_p99=p99, number=number)
            for learner in layer.learners():
                learned.setdefault(learner, []).append(step)
    for learner, steps in learned.items():
        counters = reduce(add_stats, [step.counters for step in steps])
        learner.after_step(replace(steps[0], counters=counters))
    return found


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    total_steps: int | None,
    *,
    group: ProcessGroup | None = None,
    scaler: Any = None,
    accumulation_steps: int | None = None,
) -> Attachment:
    """Let every `optimizer.step()` advance the MoE layers of `model`.

    Layers called without a context are collected from too, for as long as the model's own forward
    runs. Add their `losses` to the loss yourself, or use `Collector.loss`. Models of `etr.hf` do so
    in ``outputs.loss``; where a loss is computed from their logits or hidden states, the layers'
    losses join its backward pass, and `scaler` and `accumulation_steps` say how it is scaled.

    Args:
        model: holds MoE layers.
        optimizer: its step is the step of the schedules; resumed training goes on from the step
            stored in the layers. One that accelerate prepared is told by it what follows.
        total_steps: optimizer steps of the whole training, or None if a capacity schedule brings
            its own `steps`.
        group: ranks over which counters are summed.
        scaler: the torch.amp.GradScaler that scales the loss, or None.
        accumulation_steps: micro-batches of one optimizer step, by which the loss is divided; None
            for 1.
    Returns:
        Attachment, whose `last_stats` holds the counters of the last step.
    Raises:
        ValueError: the model has no MoE layer, total_steps < 1, or accumulation_steps < 1.
    Warns of an optimizer that holds none of the model's parameters.
    """
    if accumulation_steps is not None and accumulation_steps < 1:
        raise ValueError(f"accumulation_steps={accumulation_steps} must be at least 1 micro-batch")
    if hasattr(optimizer, "gradient_state"):  # accelerate's: its `backward` scales the loss
        scaler = scaler or optimizer.scaler  # type: ignore[attr-defined]
        accumulation_steps = accumulation_steps or optimizer.gradient_state.num_steps
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    scale = LossScale(scaler, 1 / (accumulation_steps or 1))
    return Attachment(model, optimizer, total_steps, group, scale)


class _Hook:
    """A method as a hook of a model. In a copy of the model, saved ones too, it does nothing."""

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self._method = method

    def __call__(self, *args: Any) -> None:
        if self._method is not None:
            self._method(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


class Attachment(Attached):
    """Hooks that `attach` installed; `detach` removes them.

    A copy of the model, by `copy.deepcopy` or through a file, is attached to nothing.

    Attributes:
        last_stats: counters of the last step, one dictionary per MoE layer.
        loss_scale: how the main loss is scaled; may be changed between steps.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        total_steps: int | None,
        group: ProcessGroup | None,
        loss_scale: LossScale,
    ) -> None:
        layers = moe_layers(model)
        if not layers:
            raise ValueError(f"{type(model).__name__} holds no MoE layer to attach to")
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps={total_steps} must be at least 1 optimizer step")
        self.last_stats: list[dict[str, Tensor]] = []
        self._model, self._group, self._total_steps = model, group, total_steps
        self._layers = layers
        self.loss_scale = loss_scale
        self._collector: Collector | None = None
        self._handles: list[Any] = [
            model.register_forward_pre_hook(_Hook(self._open)),
            model.register_forward_hook(_Hook(self._close), always_call=True),
            optimizer.register_step_post_hook(self._step),
            optimizer.register_load_state_dict_post_hook(_add_dimensions),
        ]
        for layer in layers:
            layer.attachment = self
        _check_parameters(model, optimizer)
        _add_dimensions(optimizer)
        self._set_progress()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # for layers that are copied or saved

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.collector = None
            if layer.attachment is self:
                layer.attachment = None

    def _open(self, module: nn.Module, args: Any) -> None:
        if any(x.collector is not None and x.collector.is_open for x in self._layers):
            return  # the caller collects
        self._collector = Collector(module)
        self._collector.__enter__()

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._collector is not None:
            self._collector.close(commit=output is not None)  # None: the forward raised

    def _step(self, *_: Any) -> None:
        self.last_stats = after_step(self._model, self._group)
        self._set_progress()

    def _set_progress(self) -> None:
        if self._total_steps is not None:
            done = int(self._layers[0].state.step)
            set_progress(self._model, min(1.0, done / self._total_steps))


def _check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    """Warn of an optimizer that trains another model, or this one's parameters of earlier."""
    own = set(map(id, model.parameters()))
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        warn(
            f"attach: the optimizer holds no parameter of {type(model).__name__}: its steps would "
            "move schedules and thresholds of a model that it does not train. Give the model's own "
            "optimizer, made after FSDP has wrapped the model"
        )


def _add_dimensions(optimizer: Optimizer) -> None:
    """Moments of single numbers had no dimension in earlier checkpoints, nor had the numbers."""
    shaped = {
        name
        for parameter, state in optimizer.state.items()
        for name, value in state.items()
        if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape
    }
    for parameter, state in optimizer.state.items():
        for name in shaped & state.keys() if parameter.shape == (1,) else ():
            if state[name].dim() == 0:
                state[name] = state[name].reshape(1)


@torch.no_grad()
def calibrate_step(model: nn.Module, group: ProcessGroup | None = None) -> None:
    """Consume the counters of one batch for the thresholds alone; batches weigh the same.

    Args:
        group: ranks over which the counters are summed, as of `after_step`.
    """
    for layer, stats in zip(moe_layers(model), _taken(model, group), strict=True):
        layer.calibrate_from(stats, decay=1.0)


def _taken(model: nn.Module, group: ProcessGroup | None) -> list[dict[str, Tensor]]:
    """The pending counters of all layers, summed over ranks; none are pending afterwards."""
    layers = moe_layers(model)
    found = [layer.pending for layer in layers]
    for layer in layers:
        layer.pending = {}
    return found if group is None else _reduced(found, group)


def _reduced(found: list[dict[str, Tensor]], group: ProcessGroup) -> list[dict[str, Tensor]]:
    """Counters of all layers summed over ranks, in one message for each dtype."""
    values = [value for stats in found for value in stats.values()]
    for dtype in sorted({value.dtype for value in values}, key=str):
        places = [i for i, value in enumerate(values) if value.dtype == dtype]
        flat = torch.cat([values[i].flatten() for i in places])
        dist.all_reduce(flat, group=group)
        parts = flat.split([values[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            values[i] = part.view_as(values[i])
    rest = iter(values)
    return [{name: next(rest) for name in stats} for stats in found]
