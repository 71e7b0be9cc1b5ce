"""With `debug`, ranks at different places, or with bad tokens, end with words and do not wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import spawn
from torch.distributed.device_mesh import init_device_mesh

from etr.moe import ExpertParallel, MoE, MoEConfig, Topology

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

DISPATCHERS = ("all_to_all", "all_to_all_padded", "chunked:all_to_all,chunks=2", "dedup")
FAULTS = ("none", "no backward", "no forward")


def on_rank(world: int) -> dict[str, str]:
    """What this rank raises for each dispatcher and fault of the last rank."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("expert",))
    topology = Topology(tuple(range(world)))
    parallel = ExpertParallel.create(mesh, topology, num_experts=4)
    at_fault = dist.get_rank() == world - 1
    found = {}
    for dispatch in DISPATCHERS:
        for fault in FAULTS:
            torch.manual_seed(0)
            config = MoEConfig(
                hidden_size=8,
                intermediate_size=8,
                num_experts=4,
                top_k=2,
                dispatch=dispatch,
                debug=True,
            )
            layers = [MoE(config, index).distribute(parallel) for index in range(2)]
            found[f"{dispatch} {fault}"] = _two_steps(layers, fault if at_fault else "none")
        found[f"{dispatch} nan"] = _bad_tokens(layers[1], 2 if at_fault else 0)
    return found


def _bad_tokens(layer: MoE, count: int) -> str:
    x = torch.randn(6, 8)
    x[:count, 3] = torch.nan
    try:
        layer(x)
    except ValueError as error:
        return str(error)
    return ""


def _two_steps(layers: list[MoE], fault: str) -> str:
    try:
        for step in range(2):
            spoiled = step == 0 and fault != "none"
            x = torch.randn(6, 8)
            for layer in layers:
                if spoiled and fault == "no forward" and layer.layer_index == 1:
                    continue
                x = layer(x).hidden_states
            if spoiled and fault == "no backward":
                continue
            x.sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_at_different_places(tmp_path: Path) -> None:
    ranks: list[dict[str, Any]] = spawn(2, on_rank, tmp_path / "two", 2)
    for dispatch in DISPATCHERS:
        assert [rank[f"{dispatch} none"] for rank in ranks] == ["", ""]
        words = "MoE layer 1 holds NaN or infinite values in 2 of 6 tokens on rank 1"
        assert [rank[f"{dispatch} nan"] for rank in ranks] == [f"hidden_states of {words}"] * 2
        for fault, second in (
            ("no backward", "forward, start of MoE layer 0"),
            ("no forward", "backward, exchange"),
        ):
            said = {rank[f"{dispatch} {fault}"] for rank in ranks}
            assert len(said) == 1, said
            (words,) = said
            assert words.startswith("ranks are at different places (rank 0: "), words
            assert f"; rank 1: {second}" in words
