"""Held-out loss token by token, and what the experts kept of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    documents: dict[str, list[float]] | None = None
    """Of each document with tokens its `domain`, number of `tokens` and mean `loss`, if asked."""


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    batches: Iterable[Any],
    selection: str,
    documents: Tensor | None = None,
) -> HeldOut:
    """Mean loss over held-out batches; the model's mode and selection are restored.

    Args:
        task: of the model.
        model: to evaluate.
        batches: all that the task holds out.
        selection: threshold or dropless.
        documents: of each token, as `Task.documents` gives it; None for no loss by document.
    """
    layers = moe_layers(model)
    losses, domains, dropped, valid = [], [], [], []
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
            valid.append(found.valid)
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
        documents=None
        if documents is None
        else _by_document(loss, domain, documents.flatten()[torch.cat(valid)]),
    )


def _by_document(loss: Tensor, domain: Tensor, document: Tensor) -> dict[str, list[float]]:
    number = torch.unique(document, return_inverse=True)[1]
    tokens = number.bincount()
    sums = number.bincount(loss)
    of_domain = torch.zeros_like(tokens).scatter_(0, number, domain)
    mean = [round(value, 6) for value in (sums / tokens).tolist()]  # results are stored as text
    return {"domain": of_domain.tolist(), "tokens": tokens.tolist(), "loss": mean}
