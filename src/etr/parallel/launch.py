"""Joining the other processes of a launch by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


def is_launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def process_group(device_type: str, timeout_seconds: int) -> Iterator[None]:
    """Join the launch's process group while the block runs; nothing without a launcher.

    An error leaves the group as it is: other ranks may be waiting in it, and it is the end of this
    process that tells them.

    Args:
        device_type: cpu, cuda, npu, ...; this process takes the device of its local rank.
        timeout_seconds: longest wait for another rank.
    """
    if not is_launched():
        yield
        return
    backend = "gloo"
    if device_type != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        backend = f"cpu:gloo,{device_type}:{dist.get_default_backend_for_device(device_type)}"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    yield
    dist.barrier()
    dist.destroy_process_group()
