"""Noticing that layers train while nobody tells them of optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from etr.moe.notice import warn

STEPS, FORWARDS = 2, 100
"""Steps that weights took, or forwards where nothing tells of steps, until it is said."""
LOOK_AT = 4096
"""Elements of a weight that are looked at."""


class Unlearned:
    """What a layer did in training since it last learned from an optimizer step.

    Its weights change by steps alone, however many micro-batches those have. Where no weight tells
    of steps, because it is frozen or sharded, forwards are counted.
    """

    def __init__(self) -> None:
        self._seen: float | None = None
        self._forwards = self._steps = 0
        self._said = False

    def learned(self) -> None:
        """The layer learned from a step."""
        self._seen, self._forwards, self._steps = None, 0, 0

    def forward(self, layer: nn.Module, others: Iterable[Unlearned]) -> None:
        """A forward with gradients begins: warn, once a model, if `layer` should have learned.

        Args:
            layer: whose weights tell of steps.
            others: of the model's other layers.
        """
        if self._said:
            return
        weight = next((p for p in layer.parameters() if p.requires_grad), None)
        now = 0.0 if weight is None else _look(weight)
        self._forwards += 1
        self._steps += self._seen is not None and now != self._seen
        self._seen = now
        if self._steps < STEPS and self._forwards < FORWARDS:
            return
        for one in (self, *others):
            one._said = True
        warn(
            "MoE layers train, but learn neither thresholds nor their schedule: call "
            "etr.attach(model, optimizer, total_steps), or after_step(model) after each step; "
            "under transformers' Trainer, add EtrCallback"
        )


def _look(weight: Tensor) -> float:
    """A number that changes when an optimizer steps, without waiting for a device."""
    if weight.device.type != "cpu" or type(weight) is not nn.Parameter:
        return weight._version  # which fused optimizers leave as it is: forwards are counted too
    return float(weight.detach().flatten()[:LOOK_AT].sum())
