"""Loss of what follows the beginning of each row of text."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from etr.data import IGNORED, Batch
from etr.hf import EtrForCausalLM
from etr.model.objective import Causal, draws
from etr.moe import selecting

log = logging.getLogger(__name__)


@torch.no_grad()
def continuation_losses(
    model: EtrForCausalLM, batches: Iterable[Batch], prompt_length: int, selection: str
) -> Tensor:
    """Mean loss of each row's tokens behind its prompt, nats per token, float64 [rows].

    Args:
        model: its mode and selection are restored.
        batches: rows without padding.
        prompt_length: tokens that are given.
        selection: a serving policy as text.
    """
    objective, found = Causal(), list[Tensor]()
    with selecting(model, selection):
        for number, batch in enumerate(batches, 1):
            log.info("held-out batch %d", number)
            text = batch.to(model.device).text(padded=False)
            example = objective.example(text, draws("held out", number))
            labels = example.labels.clone()
            labels[:, : prompt_length - 1] = IGNORED
            output = model(**example.arguments(model.dtype))
            nats = objective.losses(output.logits, example).view_as(labels)
            counted = labels != IGNORED
            found.append((nats.double() * counted).sum(1).cpu() / counted.sum(1).cpu())
    return torch.cat(found)
