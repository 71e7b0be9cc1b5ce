"""What a task offers to a loop that trains on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from etr.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One batch through the model."""

    token_losses: Tensor
    """Loss of each token, float [T]; 0 where not valid."""
    valid: Tensor
    """True for tokens that count, bool [T]."""
    domain: Tensor
    """Place of each token's domain in the task's list, int64 [T]."""
    router_losses: dict[str, Tensor]
    """Scaled losses of the MoE layers, by name."""
    stats: list[dict[str, Tensor]]
    """Counters of each MoE layer."""


class Task(Protocol):
    """A learning problem whose model has one or more MoE layers.

    Everything random depends on the config's seed alone, so that two routers with the same seed
    see the same batches and start from the same weights outside the router.
    """

    unit: str
    """Unit of the loss."""
    domains: tuple[str, ...]
    """Names of the kinds of tokens."""
    corpus: str
    """Fingerprint of the text that is learned, or empty where none is."""

    def build(self, config: TrainConfig) -> nn.Module:
        """A freshly initialised model."""
        ...

    def training_batches(self, config: TrainConfig) -> Iterator[Any]:
        """An endless stream of batches."""
        ...

    def held_out_batches(self, config: TrainConfig) -> Iterable[Any]:
        """Batches that are never trained on, the same at every call."""
        ...

    def documents(self, config: TrainConfig) -> Tensor | None:
        """Which document each held-out token is of, int64, in the batches' order and shape, padding
        included; None where tokens are drawn one by one."""
        ...

    def forward(self, model: nn.Module, batch: Any) -> Forward:
        """Run a batch and take each token's loss."""
        ...


def backward(task: Task, model: nn.Module, batch: Any, max_norm: float) -> Tensor:
    """Add the gradient of a batch and clip it.

    Args:
        task: of the model.
        model: in training mode.
        batch: one of the task's.
        max_norm: largest norm of the gradient.
    Returns:
        scalar, the mean loss of the tokens, detached.
    """
    found = task.forward(model, batch)
    loss = found.token_losses.mean()
    torch.stack([loss, *found.router_losses.values()]).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return loss.detach()
