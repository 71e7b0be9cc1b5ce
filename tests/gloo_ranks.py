"""Gloo ranks as processes, for tests that need several."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["etr.train", "etr.cli.train", "torch.distributed.run"]


def spawn(world: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What ``work(*args)`` returns on each of `world` gloo ranks.

    Args:
        work: of a module, not of a conftest: the ranks find it by its module's name.
        folder: new; what the ranks return passes through it.
    """
    folder.mkdir(parents=True)
    start(_rank, (world, work, str(folder), args), world)
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(world)]


def start(work: Callable[..., None], args: tuple[Any, ...], world: int) -> None:
    """Run ``work(rank, *args)`` in `world` processes, to their end.

    They are copies of a process that has imported the library, which is most of a start.
    """
    context()
    torch.multiprocessing.start_processes(work, args, world, start_method="forkserver")


def context() -> Any:
    """`multiprocessing` whose processes are copies of one that has imported the library."""
    torch.multiprocessing.set_forkserver_preload(PRELOADED)
    return torch.multiprocessing.get_context("forkserver")


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
