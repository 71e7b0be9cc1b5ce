"""Gloo ranks as processes, for tests that need several."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def spawn(world: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What ``work(*args)`` returns on each of `world` gloo ranks.

    Args:
        work: of a module, not of a conftest: the ranks find it by its module's name.
        folder: new; what the ranks return passes through it.
    """
    folder.mkdir(parents=True)
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(rank, world, work, str(folder), args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=900)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck, "a rank hangs"
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(world)]


def _rank(rank: int, world: int, work: Callable[..., Any], folder: str, args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    torch.save(work(*args), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
