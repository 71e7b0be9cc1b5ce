"""Whole steps of every row on an emulated cluster, in turn; each rank runs this module."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from etr.cluster.bench.plan import EMULATED
from etr.cluster.bench.sleep import add_sleeping_experts
from etr.cluster.measure import join_group
from etr.cluster.replay import Replay, Rest
from etr.files import read_json, write_json
from etr.moe import MoE, MoEConfig, set_progress
from etr.moe.dispatch import parse_dispatcher
from etr.moe.losses.locality import Locality
from etr.moe.ranks import ExpertParallel
from etr.moe.topology import Topology


def main(arguments: list[str]) -> None:
    """Time what a plan lists and write it down.

    Args:
        arguments: path of the plan, written by `etr.cluster.study.runner`.
    """
    plan = read_json(Path(arguments[0]))
    torch.set_num_threads(1)
    join_group()
    add_sleeping_experts(EMULATED, plan["seconds_per_row"])
    parallel = ExpertParallel.create(
        init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",)),
        Topology.from_environment(),
        plan["num_experts"],
    )
    replays = {row["row"]: _replay(row, parallel, plan["seconds_per_row"]) for row in plan["rows"]}
    points = range(len(plan["progress"]))
    seconds = {name: [[0.0] * len(points) for _ in range(plan["rounds"])] for name in replays}
    for number in range(-1, plan["rounds"]):  # the first round warms up
        for point in points:
            names = list(replays) if (number + point) % 2 else list(reversed(replays))
            for name in names:
                set_progress(replays[name].model, plan["progress"][point])
                taken = replays[name].step(point)
                if number >= 0:
                    seconds[name][number][point] = taken
        if dist.get_rank() == 0:
            print(f"round {number + 1} of {plan['rounds']}", flush=True)
    found = {
        name: {"seconds": seconds[name], "kept": replay.kept(), **replay.traffic()}
        for name, replay in replays.items()
    }
    if dist.get_rank() == 0:
        write_json(Path(plan["out"]), found)
    dist.barrier()
    dist.destroy_process_group()


def _replay(row: dict[str, Any], parallel: ExpertParallel, seconds_per_row: float) -> Replay:
    """A row's layers and this rank's block of what was recorded."""
    tensors = load_file(row["tensors"])
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if parse_dispatcher(row["dispatch"]).padded:  # its buffers are as large as the capacity
        parallel = dataclasses.replace(parallel, selection_group=None)
    layers = []
    for number, values in enumerate(row["layers"]):
        config = MoEConfig.from_dict(values)
        losses = tuple(  # nodes are there now, and need not be played
            dataclasses.replace(loss, nodes=None) if isinstance(loss, Locality) else loss
            for loss in config.loss_rows
        )
        config = dataclasses.replace(
            config, dispatch=row["dispatch"], backend=EMULATED, losses=losses
        )
        layer, prefix = MoE(config, number), f"layer.{number}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        layer.load_state_dict(own)
        layers.append(layer.distribute(parallel).train())
    inputs = {
        name.removeprefix("input."): value.chunk(ranks)[rank]
        for name, value in tensors.items()
        if name.startswith("input.")
    }
    per_flop = seconds_per_row / row["row_flops"]
    parameters = row["shared_parameters"] + row["expert_parameters"] / ranks
    return Replay(
        layers,
        inputs,
        Rest(
            forward_seconds=row["forward_flops"] * row["tokens_per_rank"] * per_flop,
            gradient_bytes=4 * row["shared_parameters"],
            update_seconds=row["update_flops"] * parameters * per_flop,
        ),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
