"""Bytes: what autograd holds for the backward pass, and the peak of one step."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


def saved_bytes(call: Callable[[], Any], excluded: Iterable[Tensor] = ()) -> tuple[Any, int]:
    """Run a forward and add up the storages that its graph saves, each counted once.

    Args:
        call: the forward.
        excluded: tensors whose storages are there anyway, such as parameters.
    Returns:
        what `call` returned, and bytes.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return result, sum(found.values())


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int:
    """Most bytes allocated at once during a step, beyond what was allocated before it.

    On CPU from the profiler's record of every allocation, so independent of the allocator.
    """
    if device.type != "cpu":
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        step()
        return torch.accelerator.max_memory_allocated() - before
    with quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Standard error of the whole process to nowhere: the profiler's library writes to it."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
