"""MoE layers on recorded inputs, forward and backward under a clock; every rank runs one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from etr.moe import MoE
from etr.moe.watch import LayerView, watch


@dataclass(frozen=True, kw_only=True)
class Rest:
    """What a training step does beside its MoE layers, of which only time and bytes are real."""

    forward_seconds: float = 0.0
    """Computation of the forward pass outside MoE layers; the backward pass takes twice that."""
    gradient_bytes: int = 0
    """Float32 gradients that all ranks sum after the backward pass."""
    update_seconds: float = 0.0
    """Of the optimizer."""


class Replay:
    """The MoE layers of one trained model on the ranks of this process group.

    Args:
        layers: distributed, in training mode.
        inputs: tokens of this rank by ``batch.layer``, float [T, H].
        rest: what else a step does; None for the layers alone.
    """

    def __init__(
        self, layers: Sequence[MoE], inputs: Mapping[str, Tensor], rest: Rest | None = None
    ) -> None:
        self.layers, self.model = layers, torch.nn.ModuleList(layers)
        self._inputs, self._rest = inputs, rest or Rest()
        self._gradient = torch.zeros(self._rest.gradient_bytes // 4)
        self._bytes = {"within": 0, "between": 0, "steps": 0}
        num_experts = layers[0].config.num_experts
        self._kept = torch.zeros(len(layers), num_experts, dtype=torch.int64)
        self._rows = torch.zeros(len(layers), dist.get_world_size(), dtype=torch.int64)
        self._padded = layers[0].dispatcher.padded
        self._size = inputs["0.0"].element_size() * layers[0].config.hidden_size

    def step(self, batch: int) -> float:
        """Forward and backward over a recorded batch; seconds until the last rank is done."""
        inputs = [
            self._inputs[f"{batch}.{n}"].clone().requires_grad_() for n in range(len(self.layers))
        ]
        dist.barrier()
        began = time.perf_counter()
        time.sleep(self._rest.forward_seconds)
        with watch(self.model, self._see):
            outputs = [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]
        loss = sum((o.hidden_states.sum() for o in outputs), torch.zeros(()))
        loss = loss + sum((v for o in outputs for v in o.losses.values()), torch.zeros(()))
        loss.backward()
        time.sleep(2 * self._rest.forward_seconds)
        if len(self._gradient):
            dist.all_reduce(self._gradient)
        time.sleep(self._rest.update_seconds)
        taken = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        self.model.zero_grad(set_to_none=True)
        for output in outputs:
            self._bytes["within"] += int(output.stats["bytes_within_node"])
            self._bytes["between"] += int(output.stats["bytes_between_nodes"])
        self._bytes["steps"] += 1
        return float(taken)

    def traffic(self) -> dict[str, Any]:
        """Bytes of all ranks in a forward pass, and rows between ranks in each layer, as means.

        The backward pass sends the rows again, without their counts.
        """
        counted = torch.tensor([self._bytes["within"], self._bytes["between"]], dtype=torch.float64)
        dist.all_reduce(counted)
        within, between = (counted / self._bytes["steps"]).tolist()
        return {
            "bytes_within_node": within,
            "bytes_between_nodes": between,
            "rows": self._of_ranks(self._rows).transpose(0, 1).tolist(),  # [layer, from, to]
            "row_bytes": self._size,
        }

    def kept(self) -> list[list[float]]:
        """Kept pairs of each rank's tokens (row) with each expert, over all layers, as means."""
        found: list[list[float]] = self._of_ranks(self._kept).sum(1).tolist()
        return found

    def _of_ranks(self, counts: Tensor) -> Tensor:
        """The mean over steps on every rank, [ranks, *counts]."""
        own = counts.double() / self._bytes["steps"]
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
        return torch.stack(every)

    def _see(self, number: int, view: LayerView) -> None:
        per_expert = view.selection.num_tokens_per_expert
        self._kept[number] += per_expert
        if self._padded:
            per_expert = torch.full_like(per_expert, view.selection.buffer_size)
        self._rows[number] += per_expert.view(self._rows.shape[1], -1).sum(1)


__all__ = ["Replay", "Rest"]
