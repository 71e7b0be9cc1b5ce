"""Thresholds from text, with frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.distributed import ProcessGroup

from etr.data import Batch
from etr.hf import EtrForCausalLM
from etr.moe import moe_layers
from etr.moe.training import calibrate_step


def calibrate(
    model: EtrForCausalLM,
    batches: Iterable[Batch],
    on_batch: Callable[[], None] = lambda: None,
    *,
    group: ProcessGroup | None = None,
) -> list[float]:
    """Set the thresholds to keep, on this text, what the training policy keeps; no weight changes.

    Batches should be as large as in training, since a capacity counts tokens of one batch. All
    batches weigh the same.

    Args:
        model: its schedules stay where they are.
        batches: text to calibrate on.
        on_batch: called after each batch, e.g. to advance a progress bar.
        group: ranks whose batches count together; each must bring as many.
    Returns:
        Share of choosers kept in each layer.
    Raises:
        ValueError: a layer has no scores to threshold, or there is no batch.
    """
    layers = moe_layers(model)
    for layer in layers:
        if layer.rank_by != "score" or not layer.traits.has_scores:
            raise ValueError(
                f"router {layer.config.router_config.name!r} drops by {layer.rank_by}: there is no "
                "score to put a threshold on; evaluate dropless"
            )
    device = next(model.parameters()).device
    was_training = model.training
    waiting = [layer.pending for layer in layers]
    for layer in layers:
        layer.calibration.reset_state()
        layer.pending = {}
    model.train()
    try:
        for batch in batches:
            batch = batch.to(device)
            # Counters are kept where gradients are enabled only; nothing is back-propagated.
            with torch.enable_grad():
                model(input_ids=batch.input_ids, attention_mask=batch.valid_mask.long())
            calibrate_step(model, group)
            on_batch()
    finally:
        model.train(was_training)
        for layer, pending in zip(layers, waiting, strict=True):
            layer.pending = pending
    if not layers[0].calibration.is_calibrated:
        raise ValueError("no batch to calibrate on: the text is shorter than one batch")
    return [
        float(layer.calibration.kept.sum() / layer.calibration.chosen.sum().clamp_min(1))
        for layer in layers
    ]
