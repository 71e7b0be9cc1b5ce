"""Where the time of a step goes: computation, communication, both at once, or neither."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from etr.moe import moe_layers

Interval = tuple[float, float]
NUM_OPERATORS = 20
"""Operators listed, the longest first."""
_COLLECTIVE = re.compile(r"^_?c10d|^record_param_comms|^(gloo|mpi|ucc|xccl):|nccl|hccl", re.I)


def profile_pass(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Any]:
    """Run one more forward and backward pass under torch's profiler.

    The pass leaves nothing behind: its gradients and counters are dropped, and no optimizer step
    follows, so that training and its step times are as without a profiler. On an accelerator its
    kernels are what counts, else the operators of all threads. Communication is the time during
    which a collective operation is under way. The profiler itself slows the host down, which
    shows as idle time.

    Args:
        model: between two steps; its gradients are set to None.
        loss: the forward pass; it has run before, so that nothing is set up for the first time.
    Returns:
        ``computation_seconds``, ``communication_seconds``, ``overlapped_seconds`` (part of both),
        ``idle_seconds`` (neither; the four give the wall time as computation + communication -
        overlapped + idle), and ``operators``: name, seconds (without what they call) and calls.
    """
    device = next(model.parameters()).device
    layers = moe_layers(model)
    waiting = [layer.pending for layer in layers]
    model.zero_grad(set_to_none=True)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiler = profile(activities=activities)
    with _quiet_stderr():
        profiler.__enter__()
    try:
        began = time.perf_counter()
        loss().backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        wall = time.perf_counter() - began
    finally:
        with _quiet_stderr():
            profiler.__exit__(None, None, None)
        model.zero_grad(set_to_none=True)
        for layer, pending in zip(layers, waiting, strict=True):
            layer.pending = pending
    events = list(profiler.events() or ())
    on_device = any(event.device_type != DeviceType.CPU for event in events)
    computing, communicating = _intervals(events, on_device)
    return {**split_time(computing, communicating, wall), "operators": _operators(profiler)}


def split_time(
    computing: Iterable[Interval], communicating: Iterable[Interval], wall_seconds: float
) -> dict[str, float]:
    """Total time of two sets of intervals, of what they share, and the rest of the wall time.

    Args:
        computing, communicating: (begin, end) in seconds, in any order, overlapping or not.
        wall_seconds: how long it all took.
    """
    computing, communicating = union(computing), union(communicating)
    busy = length(union([*computing, *communicating]))
    total, other = length(computing), length(communicating)
    return {
        "computation_seconds": total,
        "communication_seconds": other,
        "overlapped_seconds": max(total + other - busy, 0.0),
        "idle_seconds": max(wall_seconds - busy, 0.0),
    }


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as ascending intervals that do not touch."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > begin:
            merged.append((begin, end))
    return merged


def without(intervals: list[Interval], holes: list[Interval]) -> list[Interval]:
    """What is left of intervals outside of holes; both as `union` returns them."""
    left: list[Interval] = []
    for begin, end in intervals:
        for first, last in holes:
            if last <= begin or first >= end:
                continue
            if first > begin:
                left.append((begin, first))
            begin = max(begin, last)
        if begin < end:
            left.append((begin, end))
    return left


def length(intervals: Iterable[Interval]) -> float:
    """Summed length of intervals that do not overlap."""
    return sum(end - begin for begin, end in intervals)


def _intervals(events: list[Any], on_device: bool) -> tuple[list[Interval], list[Interval]]:
    """Computing and communicating intervals of profiler events, in seconds."""
    computing, communicating = defaultdict[Any, list[Interval]](list), list[Interval]()
    waiting = defaultdict[Any, list[Interval]](list)
    for event in events:
        if (event.device_type != DeviceType.CPU) != on_device:
            continue
        interval = (event.time_range.start * 1e-6, event.time_range.end * 1e-6)
        if _COLLECTIVE.search(event.name):
            communicating.append(interval)
            if not event.is_async:
                waiting[event.thread].append(interval)
        elif not event.is_async and not getattr(event, "is_user_annotation", False):
            computing[event.thread].append(interval)
    if on_device:
        return [i for found in computing.values() for i in found], communicating
    # An operator that calls a collective waits for it: that part of it computes nothing.
    busy = [
        interval
        for thread, found in computing.items()
        for interval in without(union(found), union(waiting[thread]))
    ]
    return busy, communicating


def _operators(profiler: profile) -> list[dict[str, Any]]:
    found = []
    for entry in profiler.key_averages():
        micros = entry.self_cpu_time_total + entry.self_device_time_total
        if entry.self_device_time_total:  # the host only waits or launches
            micros = entry.self_device_time_total
        found.append({"name": entry.key, "seconds": micros * 1e-6, "calls": entry.count})
    found.sort(key=lambda entry: -entry["seconds"])
    return found[:NUM_OPERATORS]


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what native code prints: the profiler announces its start and stop on the terminal."""
    try:
        kept = os.dup(2)
    except OSError:  # no stderr at all
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
