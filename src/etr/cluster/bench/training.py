"""Small language models trained on four ranks, and what their routers then want."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from etr.cluster.bench.plan import RANKS, RECIPES, BenchConfig, BenchRun, Recipe, nodes_of
from etr.cluster.bench.sharding import sharded_by_routing
from etr.data import Batch, OpenedData, TokenLoader, open_data
from etr.files import write_json
from etr.moe import moe_layers
from etr.moe.ranks import ExpertParallel
from etr.moe.stats import max_violation
from etr.moe.topology import Topology
from etr.moe.watch import LayerView, watch
from etr.train.loop import Trainer

REPLAY = 10_000
"""Added to the seed of a run for the text of its timed steps: as in training, in another order."""


def train_missing(bench: BenchConfig, say: Callable[[str], None]) -> None:
    """Train every run of the plan that has no result; its four ranks are processes started once.

    The ranks meet anew for each run: the threads of a process group stay until all groups are
    destroyed, and slow down what comes after.
    """
    folder = Path(bench.out) / "trained"
    missing = [run for run in bench.runs() if not (folder / run.name / "result.json").exists()]
    say(f"{len(bench.runs()) - len(missing)} of {len(bench.runs())} models are trained")
    if not missing:
        return
    open_data(bench.training(missing[0], "").data)  # built once, then read from its cache
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meetings:
        torch.multiprocessing.set_forkserver_preload([__name__])
        context = torch.multiprocessing.start_processes(
            _rank, (bench, missing, meetings), nprocs=RANKS, start_method="forkserver", join=False
        )
        try:
            while not context.join(timeout=1.0):
                pass
        finally:
            for process in context.processes:
                process.kill()


def _rank(rank: int, bench: BenchConfig, runs: list[BenchRun], meetings: str) -> None:
    torch.set_num_threads(1)
    data = open_data(bench.training(runs[0], "").data)
    for number, run in enumerate(runs, 1):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meetings}/{number}",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(minutes=5),
        )
        result = _train(bench, run, data)
        dist.destroy_process_group()
        if rank == 0:
            loss, violation = result["val_loss"], result["max_violation"]
            print(
                f"trained {number}/{len(runs)} {run.name}: held-out loss {loss:.4f}, "
                f"MaxVio {violation:.2f}",
                flush=True,
            )


def _train(bench: BenchConfig, run: BenchRun, data: OpenedData) -> dict[str, Any]:
    """Train one model, evaluate and record it; every rank returns the same result."""
    folder, rank = Path(bench.out) / "trained" / run.name, dist.get_rank()
    recipe, nodes = RECIPES[run.recipe], nodes_of(run.shape)
    trainer = Trainer(bench.training(run, str(folder / "run")), data)
    _arrange(trainer, recipe, nodes)
    trainer.loader = _loader(bench, run, data)
    half = bench.steps // 2
    with trainer:
        while not trainer.finished:
            if recipe.sharded and trainer.step == half:
                whole = _loader(bench, run, data, whole=True)
                whole.load_state_dict(trainer.loader.state_dict())
                dealt = sharded_by_routing(trainer, whole, bench.steps - half, nodes)
                trainer.loader = dealt  # type: ignore[assignment]
            trainer.train_step()
        eval_rows = trainer.evaluate()
        replay: Iterator[Batch] = _loader(bench, run, data, replay=True)
        if recipe.sharded:
            whole = _loader(bench, run, data, replay=True, whole=True)
            replay = sharded_by_routing(trainer, whole, bench.replay_batches, nodes)
        result, inputs = _record(bench, trainer, replay)
    losses = [row["val_loss"] for row in eval_rows if row["kind"] == "eval"] or [math.nan]
    found = [{"val_loss": losses[0], "dropless_loss": losses[-1]}]
    dist.broadcast_object_list(found)
    result |= found[0] | {"run": dataclasses.asdict(run), "config": trainer.config.to_dict()}
    result["corpus"] = data.corpus
    folder.mkdir(parents=True, exist_ok=True)
    save_file(inputs, folder / f"inputs-{rank}.safetensors")
    weights = _whole_layers(trainer)
    if rank == 0:
        save_file(weights, folder / "layers.safetensors")
    dist.barrier()  # the result says that all files are there
    if rank == 0:
        write_json(folder / "result.json", result)
    dist.barrier()
    return result


def _arrange(trainer: Trainer, recipe: Recipe, nodes: tuple[int, ...]) -> None:
    """Set what no option of a run sets: nodes, the group that capacity counts, and the bonus."""
    layers = moe_layers(trainer.model)
    assert layers[0].parallel is not None
    mesh = layers[0].parallel.mesh
    parallel = ExpertParallel.create(mesh, Topology(nodes), layers[0].config.num_experts)
    if recipe.per_rank:
        parallel = dataclasses.replace(parallel, selection_group=None)
    for layer in layers:
        layer.reconfigure(parallel=parallel, local_bonus=recipe.local_bonus)


def _loader(
    bench: BenchConfig,
    run: BenchRun,
    data: OpenedData,
    *,
    replay: bool = False,
    whole: bool = False,
) -> TokenLoader:
    """Text of a run, `whole` for all ranks or for this one: its own domains, or of a mixture."""
    rows = bench.replay_rows if replay else bench.rows_per_rank
    seed = run.seed + REPLAY if replay else run.seed
    options: dict[str, Any] = {}
    if whole:
        rows *= RANKS
    elif run.text == "mixed":
        options = {"rank": dist.get_rank(), "world_size": RANKS}
    else:
        places = enumerate(data.dataset.domains)
        weights = {domain: float(i % RANKS == dist.get_rank()) for i, domain in places}
        options = {"domain_weights": weights}
    length = bench.sequence_length
    return TokenLoader(data.dataset, sequence_length=length, batch_size=rows, seed=seed, **options)


@torch.no_grad()
def _record(
    bench: BenchConfig, trainer: Trainer, replay: Iterator[Batch]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Inputs of the MoE layers in the training mode of the end of training, and their routing."""
    layers = moe_layers(trainer.model)
    inputs: dict[str, Tensor] = {}
    size = (2, RANKS, len(layers), layers[0].config.num_experts)
    counts = torch.zeros(size, dtype=torch.int64)  # chosen and kept, of each rank's tokens
    chosen, kept = counts[:, dist.get_rank()]

    def see(layer: int, view: LayerView) -> None:
        inputs[f"{len(inputs) // len(layers)}.{layer}"] = view.x.clone()
        chosen[layer] += view.routing.num_choices_per_expert()
        kept[layer] += view.selection.num_tokens_per_expert

    trainer.model.train()
    with watch(trainer.model, see):
        for batch in islice(replay, bench.replay_batches):
            trainer.model(input_ids=batch.input_ids)
    for layer in layers:
        layer.pending = {}
    dist.all_reduce(counts)
    return {
        "chosen": counts[0].sum(1).tolist(),  # [ranks, experts]
        "kept": counts[1].sum(1).tolist(),
        "max_violation": float(max_violation(counts[0].sum(0)).mean()),
    }, inputs


def _whole_layers(trainer: Trainer) -> dict[str, Tensor]:
    """State of every MoE layer with all experts, by layer number; every rank must call it."""
    found = {}
    for number, layer in enumerate(moe_layers(trainer.model)):
        for name, value in layer.state_dict().items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            found[f"{number}.{name}"] = whole.detach().clone().contiguous()
    return found
