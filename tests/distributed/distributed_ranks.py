"""Gloo ranks for the tests of this folder, spawned once per number of ranks.

A test module in `JOBS` has a function ``on_rank(world) -> dict``. The spawned ranks run all of
them, together, and write down what they found; the tests compare.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent / "conformance"))  # its cells are ours too

JOBS = ("test_distributed_dispatch", "test_distributed_selection", "test_distributed_losses")
Found = list[dict[Any, Any]]


def work(rank: int, world: int, folder: str) -> None:
    """Run every job on one rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    found: dict[Any, Any] = {}
    for name in JOBS:
        found.update(importlib.import_module(name).on_rank(world))
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spawn(world: int, folder: Path) -> Found:
    """What each of `world` ranks found."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(r, world, str(folder))) for r in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=900)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck, "a rank hangs"
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(world)]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """``ranks(world)``: what each rank found, by rank."""
    known: dict[int, Found] = {}

    def found(world: int) -> Found:
        if world not in known:
            known[world] = spawn(world, tmp_path_factory.mktemp(f"ranks{world}"))
        return known[world]

    return found
