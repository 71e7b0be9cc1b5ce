"""The MoE layers of a model: which there are, and how they select while it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from etr.moe.context import EVAL_SELECTIONS, EvalSelection
from etr.moe.layer import MoE


def moe_layers(model: nn.Module) -> list[MoE]:
    """MoE layers inside `model`, itself included, in order of registration."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def set_eval_selection(model: nn.Module, selection: EvalSelection) -> None:
    """Choose how the MoE layers of `model` select in eval mode."""
    if selection not in EVAL_SELECTIONS:
        raise ValueError(f"selection={selection!r} must be one of {', '.join(EVAL_SELECTIONS)}")
    for layer in moe_layers(model):
        layer.eval_selection = selection


@contextmanager
def selecting(model: nn.Module, selection: EvalSelection) -> Iterator[None]:
    """Eval mode with a selection; each module's mode and each layer's selection are put back."""
    layers, modes = moe_layers(model), [(module, module.training) for module in model.modules()]
    before = [layer.eval_selection for layer in layers]
    set_eval_selection(model, selection)
    model.eval()
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.eval_selection = old
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training
