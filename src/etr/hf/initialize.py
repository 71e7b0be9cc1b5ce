"""Initial values of the layer's modules inside a transformers model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from etr.moe.experts import ExpertWeights
from etr.moe.experts.stand_in import StandInMap
from etr.moe.routers import Router
from etr.moe.state import GlobalState


@torch.no_grad()
def initialize(module: nn.Module, initializer_range: float) -> bool:
    """Write initial values into one module of the layer; what a checkpoint gave stays.

    Experts start like the family's own, normal with `initializer_range` and biases at 0; routers,
    and what stands in for experts, start their own way, from a random stream of their own, so that
    with one seed models that differ in them alone start from the same other weights; state starts
    at its initial values.

    Returns:
        False for a module that is not the layer's.
    """
    if isinstance(module, ExpertWeights):
        _keep_loaded(module, lambda: _normal(module, initializer_range))
    elif isinstance(module, (Router, StandInMap)):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**62, ())))
            _keep_loaded(module, module.reset_parameters)
    elif isinstance(module, GlobalState):
        _keep_loaded(module, module.reset_state)
        module.state_changed()
    else:
        return False
    return True


def _normal(module: nn.Module, std: float) -> None:
    for name, weight in module.named_parameters(recurse=False):
        if name.endswith("_bias"):
            weight.zero_()
        else:
            weight.normal_(std=std)


def _keep_loaded(module: nn.Module, reset: Callable[[], None]) -> None:
    """Run `reset`, then put back the tensors that transformers marks as loaded."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    loaded = [(t, t.clone()) for t in tensors if getattr(t, "_is_hf_initialized", False)]
    reset()
    for tensor, value in loaded:
        tensor.copy_(value)
