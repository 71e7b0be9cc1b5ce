"""Rewiring on the fly: vectors added to routers' logits, fitted to the text so far (2510.14853)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.model.decoding import DECODINGS, Decoding, Deltas
from etr.moe.checked import check_types


@dataclass(frozen=True, kw_only=True)
class Rewire(Decoding):
    """Fit a vector for each layer's router by the next-token loss of the text so far; weights stay.

    It is fitted to a prompt, and anew every so many tokens; what a cache holds stays as it was
    computed. A token that a model wrote itself counts like one that it was given.
    """

    name = "rewire"
    summary = "a vector added to each router's logits, fitted to the text so far"

    steps: int = 5
    """Of Adam, each time."""
    rate: float = 0.1
    """Of Adam, in units of the logits."""
    interval: int = 128
    """Tokens after which it is fitted again."""
    layers: float = 1.0
    """Share of the MoE layers, the last ones, that get a vector."""
    keep: bool = False
    """Fit on from the last vector, and not from 0."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.rate >= 0:
            raise ValueError(f"rate={self.rate} must be >= 0")
        if not 0 < self.layers <= 1:
            raise ValueError(f"layers={self.layers} must lie in (0, 1]")

    @property
    def branches(self) -> tuple[str | None, ...]:
        return (None,)

    def combine(self, logits: Sequence[Tensor]) -> Tensor:
        return logits[0]

    @property
    def refits_after(self) -> int | None:
        return self.interval

    def fit(self, loss: Callable[[Deltas], Tensor], start: Deltas) -> Deltas:
        last = sorted(start)[-max(1, round(self.layers * len(start))) :]
        found = {
            layer: (value.clone() if self.keep else torch.zeros_like(value)).requires_grad_()
            for layer, value in start.items()
            if layer in last
        }
        optimizer = torch.optim.Adam(list(found.values()), self.rate)
        for _ in range(self.steps):
            grads = torch.autograd.grad(loss(found).sum(), list(found.values()), allow_unused=True)
            for value, grad in zip(found.values(), grads, strict=True):
                value.grad = torch.zeros_like(value) if grad is None else grad
            optimizer.step()
        return {layer: value.detach() for layer, value in found.items()}


CARD = Card(
    name="rewire",
    title="Rewiring on the fly",
    summary=Rewire.summary,
    paper="2510.14853",
    level="model",
    branch="decoding",
    rows=(Row(table=DECODINGS, kind=Rewire),),
    against="plain",
    moves=("loss", "load", "FLOPs"),
    claim=(
        "Where a router misses the tag of a text's domain, which it had in training, 5 steps of "
        "rate 0.3 on 128 tokens close half of the gap in loss or more, and each of 12 "
        "continuations gets better, with each of 3 seeds; weights stay, and with nothing added "
        "logits are the model's bit for bit (delta = 0). Where nothing is missing, steps of 0.1 "
        "change the mean loss by less than 0.05."
    ),
    departs=(
        "Steps, rate and interval were not seen. Where weights are normalised over the chosen "
        "experts, others get no gradient. What a cache holds is not computed anew."
    ),
)
