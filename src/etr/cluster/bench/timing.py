"""Trained routing replayed on an emulated cluster, under a clock.

Each rank runs this module: the MoE layers of a trained model, forward and backward in its order,
on the inputs recorded when it was trained. Nothing else of the model runs.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from etr.cluster.bench.plan import (
    EMULATED,
    PADDED,
    REAL,
    RECIPES,
    ROWS,
    BenchConfig,
    BenchRun,
    emulated_at,
)
from etr.cluster.bench.sleep import add_sleeping_experts
from etr.cluster.measure import MeasureConfig, join_group, measure_curve
from etr.cluster.replay import Replay
from etr.files import read_json, write_json
from etr.moe import MoE, MoEConfig, set_progress
from etr.moe.ranks import ExpertParallel
from etr.moe.topology import Topology

WARM_UP = 1
"""Steps of each variant before its clock starts."""


def main(arguments: list[str]) -> None:
    """Time what a plan lists and write it down.

    Args:
        arguments: path of the plan, written by `etr.cluster.bench.run`.
    """
    plan = read_json(Path(arguments[0]))
    bench = BenchConfig(**{k: _tuple(v) for k, v in plan["bench"].items()})
    torch.set_num_threads(1)
    join_group()
    add_sleeping_experts(EMULATED, bench.seconds_per_row())
    for other in bench.other_ratios:
        add_sleeping_experts(emulated_at(other), bench.seconds_per_row(other))
    topology = Topology.from_environment()
    if plan["curve"]:
        curve = measure_curve(MeasureConfig(sizes=tuple(plan["sizes"])))
        if dist.get_rank() == 0:
            write_json(Path(plan["curve"]), curve.to_dict())
    layers = {name: MoEConfig.from_dict(values) for name, values in plan["layers"].items()}
    parallel = ranks_of(layers, topology)
    for number, job in enumerate(plan["jobs"], 1):
        result = _time(bench, job, layers, parallel)
        if dist.get_rank() == 0:
            write_json(Path(job["out"]), result)
            middle = sorted(result["seconds"])[len(result["seconds"]) // 2]
            name = f"{job['variant']}, {job['run']['text']} text, seed {job['run']['seed']}"
            print(f"timed {number}/{len(plan['jobs'])} {name}: {middle:.3f} s", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def ranks_of(layers: dict[str, MoEConfig], topology: Topology) -> ExpertParallel:
    """The ranks as all models of the benchmark use them.

    Made once for all timings: the threads of a group stay until its process ends, and slow it down.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("expert",))
    (num_experts,) = {config.num_experts for config in layers.values()}
    return ExpertParallel.create(mesh, topology, num_experts)


def _time(
    bench: BenchConfig,
    job: dict[str, Any],
    layers: dict[str, MoEConfig],
    parallel: ExpertParallel,
) -> dict[str, Any]:
    run, dispatch = BenchRun(**job["run"]), ROWS[job["variant"]].dispatch
    replay = replay_of(bench, run, layers[run.name], dispatch, job["compute"], parallel)
    for batch in range(WARM_UP):
        replay.step(batch)
    seconds = []
    for _ in range(job["rounds"]):
        seconds += [replay.step(batch) for batch in range(bench.replay_batches)]
    return {**job, "seconds": seconds, **replay.traffic()}


def replay_of(
    bench: BenchConfig,
    run: BenchRun,
    config: MoEConfig,
    dispatch: str,
    compute: str,
    parallel: ExpertParallel,
) -> Replay:
    """The MoE layers of a trained model on what was recorded for this rank.

    Args:
        bench: sizes and folders.
        run: the training run.
        config: of its MoE layers.
        dispatch: how rows travel.
        compute: name of an emulated compute, or REAL.
        parallel: the ranks, see `ranks_of`.
    """
    folder = Path(bench.out) / "trained" / run.name
    rank, recipe = dist.get_rank(), RECIPES[run.recipe]
    config = dataclasses.replace(
        config,
        dispatch=dispatch,
        backend="auto" if compute == REAL else compute,
        local_bonus=recipe.local_bonus,
    )
    if recipe.per_rank or dispatch == PADDED:  # a padded buffer is as large as the capacity
        parallel = dataclasses.replace(parallel, selection_group=None)
    weights = load_file(folder / "layers.safetensors")
    layers: list[MoE] = []
    for number in range(bench.num_layers):
        layer = MoE(config, number)
        prefix = f"{number}."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        layer.load_state_dict(own)
        layers.append(layer.distribute(parallel).train())
    set_progress(torch.nn.ModuleList(layers), 1.0)
    return Replay(layers, load_file(folder / f"inputs-{rank}.safetensors"))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main(sys.argv[1:])
