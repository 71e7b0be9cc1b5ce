"""What placements of one model take on the ranks of a cluster; `tools/serving.py` starts it.

Every rank runs whole forwards of the renumbered models on text of its own, experts divided, and
sends what tokens would that stayed where their experts are. All of it in turn, round by round.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

DISPATCHES = ("all_to_all", "dedup")
"""A row for each choice, and one for each rank that a token goes to."""


def main(path: str) -> None:
    """Time what a job lists, and write seconds, bytes and differences beside it."""
    from etr.cluster.measure import join_group
    from etr.files import read_json, write_json

    job = read_json(Path(path))
    torch.set_num_threads(1)
    join_group()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ids = load_file(job["ids"])["ids"].chunk(ranks)[rank]
    steps: dict[str, Callable[[], Any]] = {}
    found: dict[str, Any] = {"bytes": {}, "seconds": {}, "difference": 0.0}
    first = None
    for dispatch in DISPATCHES:
        for name, folder in job["models"].items():
            steps[f"{dispatch} {name}"] = forward = Forward(folder, dispatch, ids)
            logits = forward()
            first = logits if first is None else first
            apart = float(over_ranks((logits - first).abs().max(), dist.ReduceOp.MAX))
            found["difference"] = max(found["difference"], apart)
            sent = torch.tensor(forward.bytes_between_nodes)
            found["bytes"][f"{dispatch} {name}"] = int(over_ranks(sent))
    for name, flow in job["flows"].items():
        steps[f"hops {name}"] = hops(torch.tensor(flow) * job["row_bytes"])
    for number in range(job["rounds"] + 1):  # the first one warms up
        for name, step in steps.items():
            seconds = timed(step)
            if number:
                found["seconds"].setdefault(name, []).append(seconds)
    if rank == 0:
        write_json(Path(job["out"]), found)
    dist.barrier()
    dist.destroy_process_group()


class Forward:
    """A forward of a model on this rank's text, its experts divided among all ranks."""

    def __init__(self, folder: str, dispatch: str, ids: torch.Tensor) -> None:
        from etr.hf import load_pretrained
        from etr.moe import ExpertParallel, Topology, moe_layers, set_eval_selection

        self._model, self._ids = load_pretrained(folder), ids
        set_eval_selection(self._model, "dropless")
        layers = moe_layers(self._model)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",))
        topology = Topology.from_environment()
        parallel = ExpertParallel.create(mesh, topology, layers[0].config.num_experts)
        for layer in layers:
            layer.reconfigure(dispatch=dispatch)
            layer.distribute(parallel)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        self._output = self._model(input_ids=self._ids)
        logits: torch.Tensor = self._output.logits
        return logits

    @property
    def bytes_between_nodes(self) -> int:
        """What the last forward of this rank sent to other nodes."""
        return sum(int(stats["bytes_between_nodes"]) for stats in self._output.routing_stats)


def hops(sent: torch.Tensor) -> Callable[[], None]:
    """An exchange of bytes from every rank to every other."""
    rank = dist.get_rank()
    sent = sent.clone().fill_diagonal_(0)
    away, here = sent[rank].tolist(), sent[:, rank].tolist()
    leaves = torch.zeros(sum(away), dtype=torch.uint8)
    arrives = torch.zeros(sum(here), dtype=torch.uint8)

    def step() -> None:
        dist.all_to_all_single(arrives, leaves, here, away)

    return step


def timed(step: Callable[[], Any]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    began = time.perf_counter()
    step()
    return float(over_ranks(torch.tensor(time.perf_counter() - began), dist.ReduceOp.MAX))


def over_ranks(value: torch.Tensor, how: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    dist.all_reduce(value, how)
    return value


if __name__ == "__main__":
    main(sys.argv[1])
