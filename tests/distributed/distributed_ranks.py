"""Gloo ranks for the tests of this folder, spawned once per number of ranks.

A test module in `JOBS` has a function ``on_rank(world) -> dict``. The spawned ranks run all of
them, together, and write down what they found; the tests compare.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gloo_ranks import spawn

sys.path.insert(0, str(Path(__file__).parent.parent / "conformance"))  # its cells are ours too

JOBS = (
    "test_distributed_dispatch",
    "test_distributed_selection",
    "test_distributed_losses",
    "test_distributed_cost",
)
Found = list[dict[Any, Any]]


def work(world: int) -> dict[Any, Any]:
    """Run every job on one rank."""
    found: dict[Any, Any] = {}
    for name in JOBS:
        found.update(importlib.import_module(name).on_rank(world))
    return found


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Found]:
    """``ranks(world)``: what each rank found, by rank."""
    known: dict[int, Found] = {}

    def found(world: int) -> Found:
        if world not in known:
            known[world] = spawn(world, work, tmp_path_factory.mktemp("ranks") / str(world), world)
        return known[world]

    return found
