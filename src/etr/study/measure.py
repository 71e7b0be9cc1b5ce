"""What a trained model's experts are like on held-out data: clusters, similarity, domains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etr.diagnostics import (
    expert_outputs,
    expert_similarity,
    kept_calinski_harabasz,
    mutual_information,
    token_correlation,
)
from etr.moe import moe_layers, selecting
from etr.moe.watch import LayerView, watch
from etr.study.run import Run
from etr.study.tasks import TASKS, open_task

CLUSTER_TOKENS = 2048
"""Tokens behind each Calinski-Harabasz ratio: the same for every row."""
SIMILARITY_TOKENS = 512
CORRELATION_TOKENS = 512


@torch.no_grad()
def measure(run: Run, model: torch.nn.Module) -> dict[str, Any]:
    """Diagnostics of each MoE layer over the run's held-out batches, in training's selection.

    The capacity that the policy has at the end of training decides what is kept ("batch"), so that
    the kept tokens are those that the experts learned from.
    """
    task = open_task(run.task, TASKS[run.task].config(1))
    layers = moe_layers(model)
    views: list[list[LayerView]] = [[] for _ in layers]
    domains: list[Tensor] = []
    seen: dict[int, LayerView] = {}
    with selecting(model, "batch"), watch(model, seen.__setitem__):
        for batch in task.held_out_batches(run.config()):
            found = task.forward(model, batch)
            if not bool(found.valid.all()):
                continue  # padded rows would have to be cut out of every layer's tokens
            domains.append(found.domain)
            for place in range(len(layers)):
                views[place].append(seen[place])
    domain = torch.cat(domains)
    return {
        "layers": [
            _layer(layer, own, domain, len(task.domains))
            for layer, own in zip(layers, views, strict=True)
        ]
    }


def _layer(layer: Any, views: list[LayerView], domain: Tensor, num_domains: int) -> dict[str, Any]:
    num_experts = layer.config.num_choices
    x = torch.cat([view.x for view in views])
    best, kept, counts = [], [], torch.zeros(num_domains, num_experts, dtype=torch.int64)
    offset = 0
    for view in views:
        routing, selection = view.routing, view.selection
        scores = routing.scores if routing.scores is not None else routing.probs
        asked = routing.routing_map()
        if scores is None:
            label = asked.int().argmax(1)
        else:
            label = scores.masked_fill(~asked, -torch.inf).argmax(1)
        keeps = selection.selection_map(routing)
        best.append(label)
        kept.append(keeps.gather(1, label[:, None]).squeeze(1))
        rows = asked if routing.tokens_choose else keeps
        counts.index_add_(0, domain[offset : offset + len(label)], rows.long())
        offset += len(label)
    label, keep = torch.cat(best), torch.cat(kept)
    generator = torch.Generator().manual_seed(0)
    ratios = kept_calinski_harabasz(
        x,
        label,
        keep,
        num_experts,
        num_tokens=CLUSTER_TOKENS,
        by_score=layer.rank_by == "score",
        generator=generator,
    )
    some = torch.randperm(len(x), generator=generator)
    similarity = expert_similarity(expert_outputs(layer, x[some[:SIMILARITY_TOKENS]]))
    off = ~torch.eye(num_experts, dtype=torch.bool)
    sample = some[:CORRELATION_TOKENS]
    correlation = token_correlation(x[sample])
    same = label[sample][:, None] == label[sample][None, :]
    same.fill_diagonal_(False)
    other = label[sample][:, None] != label[sample][None, :]
    return {
        "calinski_harabasz_all": ratios.all,
        "calinski_harabasz_kept": ratios.kept,
        "calinski_harabasz_trimmed": ratios.trimmed,
        "cluster_tokens": ratios.num_tokens,
        "expert_similarity": float(similarity[off].mean()),
        "mutual_information_bits": mutual_information(counts),
        "correlation_same_expert": float(correlation[same].mean()) if bool(same.any()) else None,
        "correlation_other_expert": float(correlation[other].mean()) if bool(other.any()) else None,
        "max_violation": float(counts.sum(0).max() / counts.sum(0).double().mean() - 1),
    }
