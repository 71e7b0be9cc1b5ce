"""The loss of one optimizer step over micro-batches and ranks, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from etr.data import Batch
from etr.hf import EtrForCausalLM
from etr.model.objective import Causal, Example, Objective, draws
from etr.parallel import Ranks


class StepLoss:
    """Mean of an objective over all that a step counts, wherever it is, plus the router losses.

    Router losses are averaged over micro-batches; over ranks they are what one rank with all
    tokens would have (see `etr.moe.losses`).

    Args:
        model: run in its own mode.
        ranks: each has its rows of every micro-batch.
        precision: bf16 runs under autocast.
        objective: what is trained on.
        seed: of what the objective draws, beside the number of the step and the rank.
    """

    def __init__(
        self,
        model: EtrForCausalLM,
        ranks: Ranks,
        precision: Literal["fp32", "bf16"],
        objective: Objective | None = None,
        seed: int = 0,
    ) -> None:
        self._model, self._ranks, self._bf16 = model, ranks, precision == "bf16"
        self._objective, self._seed = objective or Causal(), seed

    def backward(self, batches: Sequence[Batch], step: int = 0) -> tuple[float, dict[str, float]]:
        """Add the gradient of this rank's part of the loss; the sum over ranks is the whole.

        Args:
            batches: the step's micro-batches, on the device.
            step: number of the step.
        Returns:
            mean of the objective, nats per token, and each router loss, of all ranks together.
        """
        examples = [self._example(batch, step, number) for number, batch in enumerate(batches)]
        counted = self._ranks.sum_numbers([sum(int(e.counted.sum()) for e in examples)])[0]
        parts = len(batches) * self._ranks.size
        nats, losses = 0.0, dict[str, float]()
        for example in examples:
            total, router_losses = self.forward(example)
            share = total / max(counted, 1)
            (share + sum(router_losses.values()) / parts).backward()
            nats += float(share.detach())
            for name, value in router_losses.items():
                losses[name] = losses.get(name, 0.0) + float(value.detach()) / parts
        names = sorted(losses)
        nats, *values = self._ranks.sum_numbers([nats, *(losses[name] for name in names)])
        return nats, dict(zip(names, values, strict=True))

    def local_loss(self, batch: Batch) -> Tensor:
        """Loss of this rank's rows alone."""
        example = self._example(batch, 0, 0)
        total, router_losses = self.forward(example)
        return total / max(int(example.counted.sum()), 1) + sum(router_losses.values())

    def forward(self, example: Example) -> tuple[Tensor, dict[str, Tensor]]:
        """Summed loss of the objective, nats, and the scaled router losses."""
        device = example.input_ids.device.type
        dtype = torch.bfloat16 if self._bf16 else self._model.dtype
        with torch.autocast(device, torch.bfloat16, enabled=self._bf16):
            output = self._model(**example.arguments(dtype))
        return self._objective.total(output.logits, example), output.router_losses

    def _example(self, batch: Batch, step: int, number: int) -> Example:
        generator = draws(self._seed, step, number, self._ranks.rank)
        return self._objective.example(batch.text(padded=False), generator)
