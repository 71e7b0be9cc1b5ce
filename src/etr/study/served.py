"""What a trained model's MoE layers do with held-out tokens as the model is served."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from etr.moe import MoE, RoutingContext, moe_layers, selecting
from etr.moe.losses import balance_loss
from etr.moe.stats import max_violation
from etr.moe.watch import LayerView, watch
from etr.study.run import Run
from etr.study.tasks import TASKS, open_task

BATCHES = 8
"""Held-out batches at most."""
WINDOW = 32
"""Neighbouring tokens whose different experts are counted."""
RANKS, NODES = 4, 2
"""The ranks over which tokens and experts are imagined, in blocks."""
REPEATS = 5
"""Of the router's time and the layer's; the least counts."""


@torch.no_grad()
def measure_served(run: Run, model: torch.nn.Module) -> dict[str, Any]:
    """Numbers of each MoE layer: means over batches; keys as in `of_view`, and the router's share.

    By thresholds where the layer has them, else dropless.
    """
    task, layers = open_task(run.task, TASKS[run.task].config(1)), moe_layers(model)
    seen: dict[int, LayerView] = {}
    found: list[list[dict[str, float]]] = [[] for _ in layers]
    with warnings.catch_warnings(), selecting(model, "threshold"):
        warnings.filterwarnings("ignore", message="MoE layer evaluates dropless")
        with watch(model, seen.__setitem__):
            for batch in islice(task.held_out_batches(run.config()), BATCHES):
                task.forward(model, batch)
                for place, view in seen.items():
                    found[place].append(of_view(layers[place], view))
        shares = [router_share(layer, seen[place].x) for place, layer in enumerate(layers)]
    return {
        "layers": [
            {key: statistics.fmean(one[key] for one in own) for key in own[0]}
            | {"router_share": share}
            for own, share in zip(found, shares, strict=True)
        ]
    }


def of_view(layer: MoE, view: LayerView) -> dict[str, float]:
    """Numbers of one layer on T tokens in order.

    Returns:
        experts_mean, experts_spread: experts that run for a token, and the standard deviation.
        unique_experts: different ones in `WINDOW` neighbouring tokens.
        bytes_between_nodes: of a token's float32 rows, there and back.
        expert_flops: of a token's forward pass.
        max_violation: of what was chosen. balance_loss: where routers have probabilities.
    """
    runs = experts_run(layer, view)
    count, experts = runs.shape
    each = runs.sum(1).double()
    whole = runs[: max(count // WINDOW, 1) * WINDOW]
    windows = torch.stack([part.any(0).sum() for part in whole.split(WINDOW)])
    node = torch.arange(experts) * RANKS // experts // (RANKS // NODES)
    away = runs & (node != (torch.arange(count) * NODES // count)[:, None])
    chosen = view.routing.num_choices_per_expert()
    found = {
        "experts_mean": float(each.mean()),
        "experts_spread": float(each.std(correction=0)),
        "unique_experts": float(windows.double().mean()),
        "bytes_between_nodes": 2 * 4 * view.x.shape[1] * float(away.sum()) / count,
        "max_violation": float(max_violation(chosen)),
        "expert_flops": layer.bank.flops_of_any_token
        + float(layer.bank.flops(view.selection.num_tokens_per_expert)) / count,
    }
    if view.routing.probs is not None:
        found["balance_loss"] = float(balance_loss(view.routing, chosen).detach())
    return found


def experts_run(layer: MoE, view: LayerView) -> Tensor:
    """Which experts with weights run for which token, bool [T, E]."""
    tables = []
    for pairs, kept in layer.bank.plan(view.routing, view.selection):
        table = torch.zeros(pairs.num_tokens, pairs.num_experts, dtype=torch.bool)
        table[pairs.token[kept.kept], pairs.expert[kept.kept]] = True
        tables.append(table)
    return torch.cat(tables, dim=1)


def router_share(layer: MoE, x: Tensor) -> float:
    """Processor time of routing tokens [T, H] over that of the layer in eval mode."""

    def least(call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(REPEATS):
            began = time.process_time()
            call()
            taken.append(time.process_time() - began)
        return min(taken)

    # A layer by itself has none before it, and hashes numbers as fast as the text's.
    context = RoutingContext(token_ids=torch.arange(len(x)), logits={})
    whole = least(lambda: layer.walk(x, context))
    return least(lambda: layer.route(x, context)) / max(whole, 1e-9)
