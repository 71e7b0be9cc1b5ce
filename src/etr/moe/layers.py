"""The MoE layers of a model: which there are, and how they route while it is evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from etr.moe.layer import MoE
from etr.moe.serving import Serving, serving_of
from etr.moe.serving.dropless import Dropless


def moe_layers(model: nn.Module) -> list[MoE]:
    """MoE layers inside `model`, itself included, in order of registration.

    A further inner step of a layer is one too, after the layer.
    """
    return [module for module in model.modules() if isinstance(module, MoE)]


def tie_experts(layers: Sequence[MoE]) -> None:
    """Let layers of a model whose banks are shared hold one; see `Shared`.

    Args:
        layers: all of the model's, in order.
    Raises:
        ValueError: layers that would share a bank have other experts.
    """
    for place, layer in enumerate(layers):
        number = layer.config.bank_config.owner(place)
        own, other = (
            {name: getattr(config, name) for name in _OF_EXPERTS}
            for config in (layer.config, layers[number].config)
        )
        if own != other:
            wrong = [f"{n}: {own[n]!r}, {other[n]!r}" for n in own if own[n] != other[n]]
            raise ValueError(
                f"MoE layers {place} and {number} share a bank and differ in {'; '.join(wrong)}"
            )
        for step in (layer, *layer.later):
            step.experts = layers[number].experts


_OF_EXPERTS = (
    *("hidden_size", "intermediate_size", "num_experts", "bank_config", "activation"),
    *("expert_bias", "swiglu_limit", "swiglu_alpha"),
)
"""Fields of a config that say what experts are."""


def set_eval_selection(model: nn.Module, selection: str | Serving) -> None:
    """Choose how the MoE layers of `model` route in eval mode.

    Args:
        selection: a serving policy, or its text: a name in `SERVING`, perhaps with options.
    """
    serving = serving_of(selection, "selection")
    for layer in moe_layers(model):
        layer.serving = serving


def effective_serving(model: nn.Module, asked: str | Serving) -> tuple[Serving, str | None]:
    """The policy by which the MoE layers of `model` route when asked to route by `asked`.

    Waits for the device.

    Returns:
        That policy and None; or, where it refuses any of the layers, dropless and why.
    """
    serving = serving_of(asked, "selection")
    reasons = (serving.refuses(layer.facts()) for layer in moe_layers(model))
    reason = next(filter(None, reasons), None)
    return (serving, None) if reason is None else (Dropless(), reason)


@contextmanager
def selecting(model: nn.Module, selection: str | Serving) -> Iterator[None]:
    """Eval mode with a serving policy; each module's mode and each layer's policy are put back."""
    layers, modes = moe_layers(model), [(module, module.training) for module in model.modules()]
    before = [layer.serving for layer in layers]
    set_eval_selection(model, selection)
    model.eval()
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.serving = old
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training


@contextmanager
def reconfigured(model: nn.Module, **options: Any) -> Iterator[None]:
    """Other options for the time being; see `MoE.reconfigure`.

    Routers, policies and dispatchers are put back, and what they have learned is as it was before.
    """
    layers = moe_layers(model)
    before = [layer.snapshot() for layer in layers]
    try:
        for layer in layers:
            layer.reconfigure(**options)
        yield
    finally:
        for layer, parts in zip(layers, before, strict=True):
            layer.restore(parts)
