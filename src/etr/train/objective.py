"""The loss of one optimizer step over micro-batches and ranks, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.data import IGNORED, Batch
from etr.hf import EtrForCausalLM
from etr.parallel import Ranks


class Objective:
    """Mean cross-entropy over every label of a step, wherever it is, plus the router losses.

    Router losses are averaged over micro-batches; over ranks they are what one rank with all
    tokens would have (see `etr.moe.losses`).

    Args:
        model: run in its own mode.
        ranks: each has its rows of every micro-batch.
        precision: bf16 runs under autocast.
    """

    def __init__(
        self, model: EtrForCausalLM, ranks: Ranks, precision: Literal["fp32", "bf16"]
    ) -> None:
        self._model, self._ranks, self._bf16 = model, ranks, precision == "bf16"

    def backward(self, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """Add the gradient of this rank's part of the loss; the sum over ranks is the whole.

        Args:
            batches: the step's micro-batches, on the device.
        Returns:
            cross-entropy, nats per token, and each router loss, of all ranks together.
        """
        labels = self._ranks.sum_numbers([sum(_num_labels(batch) for batch in batches)])[0]
        parts = len(batches) * self._ranks.size
        nats, losses = 0.0, dict[str, float]()
        for batch in batches:
            total, router_losses = self.forward(batch)
            share = total / max(labels, 1)
            (share + sum(router_losses.values()) / parts).backward()
            nats += float(share.detach())
            for name, value in router_losses.items():
                losses[name] = losses.get(name, 0.0) + float(value.detach()) / parts
        names = sorted(losses)
        nats, *values = self._ranks.sum_numbers([nats, *(losses[name] for name in names)])
        return nats, dict(zip(names, values, strict=True))

    def local_loss(self, batch: Batch) -> Tensor:
        """Loss of this rank's rows alone."""
        total, router_losses = self.forward(batch)
        return total / max(_num_labels(batch), 1) + sum(router_losses.values())

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed cross-entropy, nats, and the scaled router losses."""
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=self._bf16):
            output = self._model(input_ids=batch.input_ids)
        logits = output.logits.flatten(0, 1)
        nats = F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)),
            batch.labels.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        return nats, output.router_losses


def _num_labels(batch: Batch) -> int:
    return int((batch.labels != IGNORED).sum())
