"""What the MoE layers of a trained model get along the schedule, and what else its steps do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from etr.cluster.study.plan import RANKS, EqualTimeStudy
from etr.files import read_json, whole_file, write_json
from etr.moe import moe_layers, set_progress
from etr.moe.watch import LayerView, watch
from etr.study.run import Run, load_model
from etr.study.tasks import TASKS, open_task

REPLAY = 10_000
"""Added to the seed for the text of timed steps: as in training, in another order."""
UPDATE_FLOPS = 12
"""Operations of AdamW on a parameter."""


@torch.no_grad()
def capture(run: Run, weights: Path, folder: Path, study: EqualTimeStudy) -> dict[str, Any]:
    """Record a run once: tensors in ``folder/NAME.safetensors``, all else is returned.

    Routing is that of the trained weights; the capacity is that of each point.

    Args:
        run: finished, its weights kept.
        weights: folder of them.
        folder: for what is recorded; what is there is not recorded again.
        study: points of the schedule and sizes.
    """
    found, tensors = folder / f"{run.row}.json", folder / f"{run.row}.safetensors"
    if not found.exists():
        model, inputs = load_model(run, weights).train(), dict[str, Tensor]()
        layers = moe_layers(model)
        config = run.config()
        data = dataclasses.replace(config.data, batch_size=RANKS * study.sequences_per_rank)
        config = dataclasses.replace(config, data=data, seed=run.seed + REPLAY)
        task = open_task(run.task, TASKS[run.task].config(1))
        batch = next(iter(task.training_batches(config)))
        for point, progress in enumerate(study.progress):
            set_progress(model, progress)

            def see(layer: int, view: LayerView, point: int = point) -> None:
                inputs[f"input.{point}.{layer}"] = view.x.clone()

            with watch(model, see):
                task.forward(model, batch)
        for number, layer in enumerate(layers):
            layer.pending = {}
            inputs |= {f"layer.{number}.{k}": v.clone() for k, v in layer.state_dict().items()}
        with whole_file(tensors) as path:
            save_file({name: value.contiguous() for name, value in inputs.items()}, str(path))
        write_json(found, {"layers": [x.config.to_dict() for x in layers], **_rest(model, config)})
    return {**read_json(found), "tensors": str(tensors), "row": run.row}


def _rest(model: nn.Module, config: Any) -> dict[str, Any]:
    """What a step does outside MoE layers: FLOPs of a token's forward pass, and parameters.

    FLOPs are those of matrix products and of causal attention, once for each MoE layer.
    """
    layers, length = moe_layers(model), config.data.sequence_length
    inside = {id(module) for layer in layers for module in layer.modules()}
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear) and id(module) not in inside
    )
    experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    one = layers[0].config
    of_expert = sum(p.numel() for p in layers[0].experts.parameters()) // one.num_experts
    return {
        "forward_flops": 2 * linear + len(layers) * 2 * length * one.hidden_size,
        "row_flops": 2 * of_expert,
        "shared_parameters": sum(p.numel() for p in model.parameters()) - experts,
        "expert_parameters": experts,
        "hidden_size": one.hidden_size,
        "tokens_per_rank": length * config.data.batch_size // RANKS,
    }


__all__ = ["UPDATE_FLOPS", "capture"]
