"""Megatron-Core's layer as a system of the benchmark: it computes what the others compute."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases import FEW_TOP_1, FEW_TOP_2, layer_cases
from benchmarks.check import Reference, check
from benchmarks.systems.base import make_problem
from benchmarks.systems.megatron_layer import build

pytest.importorskip("megatron", reason="needs megatron-core: pip install 'etr-moe[megatron]'")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.core") is None, reason="needs megatron-core"
)


def worker(rank: int) -> None:
    """Every dtype and top-k on a CPU, in a process whose CUDA has stand-ins."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
    from megatron_stubs import stub_cuda

    stub_cuda()
    top_ks = {FEW_TOP_1.top_k, FEW_TOP_2.top_k}
    for case in layer_cases():
        if case.top_k in top_ks:
            small = dataclasses.replace(case, num_tokens=64, hidden_size=64, intermediate_size=32)
            problem = make_problem(small, torch.device("cpu"))
            reference = Reference(problem.x, problem.upstream, problem.up, problem.down)
            assert not check(build(problem), problem.x, problem.upstream, reference)


@pytest.mark.slow
def test_it_equals_the_plain_loops() -> None:
    torch.multiprocessing.spawn(worker, nprocs=1)
