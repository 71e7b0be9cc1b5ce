"""Routing state beside the weights of an adapter.

PEFT saves what it trains, and the thresholds that training learned are none of that: loaded onto
its base, an adapter would select as the base does. So the state of all layers goes into the
adapter's file. Loading needs nothing: PEFT loads every name that the file has.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from etr.moe.state import GlobalState


def routing_state(model: nn.Module) -> dict[str, Tensor]:
    """Thresholds, counters and so on of all layers of `model`, by name in its state dict."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        if isinstance(module, GlobalState)
        for name, value in module.named_buffers(recurse=False)
    }


@functools.cache
def save_with_adapters() -> None:
    """Let `PeftModel.save_pretrained` save the routing state too, from now on.

    PEFT has no way to name further tensors of a model, so what it collects is wrapped. Models
    without layers of this library are saved as before.
    """
    import peft.peft_model as module

    collect = module.get_peft_model_state_dict

    @functools.wraps(collect)
    def with_state(model: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {**collect(model, *args, **kwargs), **routing_state(model)}

    module.get_peft_model_state_dict = with_state
