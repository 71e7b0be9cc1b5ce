"""Distribution of selection scores: of the chosen experts, and of all others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from etr.data import Batch
from etr.hf import EtrForCausalLM
from etr.model.objective import Causal, Objective, draws
from etr.moe import moe_layers
from etr.moe.watch import LayerView, watch


@torch.no_grad()
def score_densities(
    model: EtrForCausalLM,
    batches: Iterable[Batch],
    num_bins: int = 80,
    objective: Objective | None = None,
) -> dict[str, Any] | None:
    """Densities of the router's scores over held-out tokens, all layers together.

    Args:
        model: run in eval mode; restored.
        batches: held-out text.
        num_bins: equal bins between the smallest and the largest score.
        objective: what the model was trained on; None for the next token.
    Returns:
        ``{"edges": [n + 1], "own": [n], "others": [n]}``, or None where the router has no scores.
    """
    layers, objective = moe_layers(model), objective or Causal()
    if not all(layer.traits.has_scores for layer in layers):
        return None
    own: list[Tensor] = []
    others: list[Tensor] = []

    def record(place: int, view: LayerView) -> None:
        routing = view.routing
        assert routing.scores is not None  # checked above for every layer
        chosen = routing.routing_map()
        if not routing.tokens_choose:  # the k best stand for the choice
            best = routing.scores.topk(routing.top_k, dim=-1).indices
            chosen = torch.zeros_like(chosen).scatter(1, best, True)
        mask = routing.valid_mask
        own.append(routing.scores[mask][chosen[mask]].float().cpu())
        others.append(routing.scores[mask][~chosen[mask]].float().cpu())

    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        with watch(model, record):
            for number, batch in enumerate(batches, 1):
                example = objective.example(batch.to(device).text(), draws("held out", number))
                model(**example.arguments(model.dtype))
    finally:
        model.train(was_training)
    if not own:
        return None
    mine, rest = torch.cat(own), torch.cat(others)
    low = float(min(mine.min(), rest.min() if len(rest) else mine.min()))
    high = float(max(mine.max(), rest.max() if len(rest) else mine.max()))
    edges = torch.linspace(low, max(high, low + 1e-6), num_bins + 1)
    return {
        "edges": edges.tolist(),
        "own": torch.histogram(mine, edges, density=True).hist.tolist(),
        "others": torch.histogram(rest, edges, density=True).hist.tolist() if len(rest) else [],
    }
