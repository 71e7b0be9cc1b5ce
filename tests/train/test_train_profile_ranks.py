"""The split of a real two-rank trace into computation, communication and what overlaps."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import start
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from etr.moe import MoE, MoEConfig
from etr.moe.ranks import ExpertParallel
from etr.moe.topology import Topology
from etr.train.profile import profile_pass

pytestmark = pytest.mark.distributed
WORLD = 2
PARTS = ("computation_seconds", "communication_seconds", "overlapped_seconds", "idle_seconds")


def work(model: nn.Module, *, overlap: bool) -> Tensor:
    """A sum over ranks, and multiplications during or after it.

    With `overlap`, the second rank joins the sum when the first has multiplied, so that there all
    of its multiplications fall into the sum, however busy the machine is.
    """
    store, first = dist.distributed_c10d._get_default_store(), dist.get_rank() == 0
    dist.barrier()
    message = torch.ones(1 << 16)
    weight = next(model.parameters())
    matrix = weight.detach()  # no backward pass, which would add to the computation
    if overlap and not first:
        store.wait(["multiplied"])
    handle = dist.all_reduce(message, async_op=True)
    if not overlap:
        handle.wait()
    for _ in range(60):
        matrix = matrix @ matrix / matrix.shape[0]
    if overlap and first:
        store.set("multiplied", "")
    handle.wait()
    dist.barrier()
    if overlap and first:
        store.delete_key("multiplied")
    return weight.sum()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    dense = nn.Linear(256, 256, bias=False)
    found: dict[str, Any] = {}
    for overlap in (False, True):
        work(dense, overlap=overlap)
        dist.barrier()
        name = "overlapping" if overlap else "one after the other"
        found[name] = profile_pass(dense, lambda overlap=overlap: work(dense, overlap=overlap))
    for dispatch in ("all_to_all", "chunked:all_to_all,chunks=2"):
        layer = MoE(
            MoEConfig(hidden_size=64, intermediate_size=64, num_experts=4, dispatch=dispatch)
        )
        mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("expert",))
        layer.distribute(ExpertParallel.create(mesh, Topology((0, 1)), 4))
        x = torch.randn(512, 64)
        layer(x).hidden_states.sum().backward()
        found[dispatch] = profile_pass(layer, lambda layer=layer, x=x: layer(x).hidden_states.sum())
    torch.save(found, f"{folder}/found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("profiles")
    start(worker, (str(folder),), WORLD)
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(WORLD)]


def test_overlap_is_seen_where_there_is_some_and_only_there(profiles):
    after, during = (profiles[0][name] for name in ("one after the other", "overlapping"))
    for found in (after, during):
        assert found["communication_seconds"] > 0
        assert found["computation_seconds"] > 0
    shares = [
        found["overlapped_seconds"] / found["computation_seconds"] for found in (after, during)
    ]
    assert shares[0] == pytest.approx(0, abs=1e-9)
    assert shares[1] > 0.5


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("name", ["all_to_all", "chunked:all_to_all,chunks=2"])
def test_a_layer_across_ranks_communicates_in_both_passes(profiles, rank, name):
    found = profiles[rank][name]
    computation, communication, overlapped, idle = (found[part] for part in PARTS)
    assert min(computation, communication) > 0
    assert 0 <= overlapped <= min(computation, communication)
    assert idle >= 0
    exchanges = [
        o for o in found["operators"] if "all_to_all" in o["name"] or "alltoall" in o["name"]
    ]
    assert sum(o["calls"] for o in exchanges) >= 4
