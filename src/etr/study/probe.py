"""Held-out loss token by token, and what the experts kept of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from etr.evaluate.held_out import effective_selection
from etr.moe import moe_layers, selecting
from etr.moe.watch import LayerView, watch
from etr.train.tasks import Task


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Held-out loss in one selection."""

    loss: float
    """Mean loss over tokens."""
    loss_by_domain: dict[str, float]
    """Mean loss by domain."""
    kept_per_token: float
    """Kept pairs per token and layer: the expert compute of one token."""
    dropped_share: float
    """Share of tokens that some layer gave no expert."""
    dropped_loss: float | None
    """Mean loss of those tokens; None where there are none."""
    kept_loss: float | None
    """Mean loss of the other tokens; None where there are none."""
    selection: str
    """Threshold or dropless, as it really was."""


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, batches: Iterable[Any], selection: str) -> HeldOut:
    """Mean loss over held-out batches; the model's mode and selection are restored."""
    layers = moe_layers(model)
    losses, domains, dropped = [], [], []
    kept = tokens = 0
    views: dict[int, LayerView] = {}
    with selecting(model, selection), watch(model, views.__setitem__):
        for batch in batches:
            found = task.forward(model, batch)
            none = torch.zeros_like(found.valid)
            for view in views.values():
                per_token = view.selection.selection_map(view.routing).sum(1)
                none |= per_token == 0
                kept += int(per_token[found.valid].sum())
            tokens += int(found.valid.sum()) * len(layers)
            losses.append(found.token_losses[found.valid].double())
            domains.append(found.domain[found.valid])
            dropped.append(none[found.valid])
    loss, domain, mask = torch.cat(losses), torch.cat(domains), torch.cat(dropped)
    return HeldOut(
        loss=float(loss.mean()),
        loss_by_domain={
            name: float(loss[domain == d].mean())
            for d, name in enumerate(task.domains)
            if bool((domain == d).any())
        },
        kept_per_token=kept / tokens,
        dropped_share=float(mask.double().mean()),
        dropped_loss=float(loss[mask].mean()) if bool(mask.any()) else None,
        kept_loss=float(loss[~mask].mean()) if bool((~mask).any()) else None,
        selection=effective_selection(model, selection),
    )
