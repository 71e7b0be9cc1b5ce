"""What the MoE layers of a model do to held-out tokens: one row of diagnostics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from etr.data import Batch, TokenDataset, held_out_batches
from etr.diagnostics import (
    affinity_histogram,
    expert_outputs,
    expert_similarity,
    kept_calinski_harabasz,
    mutual_information,
    token_correlation,
)
from etr.hf import EtrForCausalLM
from etr.model.objective import Causal, Objective, draws
from etr.moe import MoE, moe_layers, selecting
from etr.moe.watch import LayerView, watch
from etr.train.metrics import finite

SIMILARITY_TOKENS = 256
"""Tokens that every expert is run on."""
CORRELATION_TOKENS = 48
"""Tokens whose features are correlated."""
RATIOS = ("all", "kept", "trimmed")
CLUSTER_SHARE = 0.25
"""Part of the tokens behind each Calinski-Harabasz ratio: so few that capacity leaves as many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Observed:
    """What one layer did to N valid tokens."""

    x: Tensor
    """Its input, float32 [N, H]."""
    expert: Tensor
    """The expert each token wants most, int64 [N]."""
    kept: Tensor
    """Whether that expert keeps it as in training, bool [N]."""
    chosen: Tensor
    """Chosen, bool [N, E]."""
    scores: Tensor | None
    """Selection scores [N, E], or None where the router has none."""
    domain: Tensor
    """Domain, int64 [N]."""


def mixed_batches(
    dataset: TokenDataset, sequence_length: int, batch_size: int, num_tokens: int
) -> list[Batch]:
    """Held-out rows with the domains in turn, so that experts compete over a mixture.

    Args:
        dataset: what to read.
        sequence_length: tokens per row.
        batch_size: most rows per batch.
        num_tokens: about how many tokens in all; every domain gives as many, at least a row.
    """
    share = max(num_tokens // len(dataset.domains), 1)
    found = list(held_out_batches(dataset, sequence_length, batch_size, share))
    if not found:
        return []
    every = {name: torch.cat([getattr(b, name) for b in found]) for name in vars(found[0])}
    domain = every["domain"]
    turn = torch.zeros_like(domain)
    for number in domain.unique().tolist():
        turn[domain == number] = torch.arange(int((domain == number).sum()))
    order = (turn * len(dataset.domains) + domain).argsort()
    return [
        Batch(**{name: value[rows] for name, value in every.items()})
        for rows in order.split(batch_size)
    ]


@torch.no_grad()
def diagnose(
    model: EtrForCausalLM,
    batches: Sequence[Batch],
    domains: tuple[str, ...],
    objective: Objective | None = None,
) -> dict[str, Any]:
    """Values of a row of kind ``diagnostics``; the model's mode and selection are restored.

    Experts keep what their capacity policy would keep of each batch, as in training. Subsets of
    tokens are the same at every call.

    Args:
        model: run in eval mode on its own device.
        batches: of `mixed_batches`.
        domains: names by the batches' domain numbers.
        objective: what the model was trained on; None for the next token.
    """
    layers = [_joined(parts) for parts in _observe(model, batches, objective or Causal())]
    last = layers[-1]
    few = _spread(len(last.x), CORRELATION_TOKENS)
    few = few[last.expert[few].argsort(stable=True)]
    return {
        "domains": list(domains),
        "layers": [
            _layer_values(layer, seen, len(domains))
            for layer, seen in zip(moe_layers(model), layers, strict=True)
        ],
        "token_correlation": _plain(token_correlation(last.x[few])),
        "token_expert": last.expert[few].tolist(),
    }


def _layer_values(layer: MoE, seen: Observed, num_domains: int) -> dict[str, Any]:
    num_experts = layer.config.num_choices
    by_score = layer.rank_by == "score" and layer.traits.has_scores
    values: dict[str, Any] = {f"calinski_harabasz_{name}": None for name in RATIOS}
    if len(seen.x) and layer.config.hidden_size >= num_experts:
        ratios = kept_calinski_harabasz(
            seen.x,
            seen.expert,
            seen.kept,
            num_experts,
            num_tokens=max(int(CLUSTER_SHARE * len(seen.x)), 1),
            by_score=by_score,
            generator=torch.Generator().manual_seed(0),
        )
        for name in RATIOS:
            values[f"calinski_harabasz_{name}"] = finite(getattr(ratios, name))
    few = _spread(len(seen.x), SIMILARITY_TOKENS)
    values["expert_similarity"] = _plain(expert_similarity(expert_outputs(layer, seen.x[few])))
    counts = torch.zeros(num_domains, num_experts, dtype=torch.int64, device=seen.x.device)
    counts.index_add_(0, seen.domain, seen.chosen.long())
    values["domain_expert"] = counts.tolist()
    values["mutual_information_bits"] = mutual_information(counts)
    if seen.scores is not None and len(seen.x):
        histogram = affinity_histogram(seen.scores, seen.chosen)
        values["affinity_edges"] = histogram.edges.tolist()
        values["affinity_own"] = _plain(histogram.own)
        values["affinity_others"] = _plain(histogram.others)
    return values


def _observe(
    model: EtrForCausalLM, batches: Sequence[Batch], objective: Objective
) -> list[list[Observed]]:
    """What each layer did to each batch."""
    found: list[list[Observed]] = [[] for _ in moe_layers(model)]
    device = next(model.parameters()).device
    domain = torch.zeros(0)

    def see(place: int, view: LayerView) -> None:
        found[place].append(_observed(view, domain))

    with selecting(model, "batch"), watch(model, see):
        for number, batch in enumerate(batches, 1):
            batch = batch.to(device)
            example = objective.example(batch.text(), draws("held out", number))
            domain = batch.domain.repeat_interleave(example.input_ids.shape[1])
            model(**example.arguments(model.dtype))
    return found


def _observed(view: LayerView, domain: Tensor) -> Observed:
    routing = view.routing
    keeps = view.selection.selection_map(routing)
    if routing.tokens_choose:
        chosen = routing.routing_map()
        expert = routing.expert.view(routing.num_tokens, -1)[:, 0]
    else:  # the k best stand for the choice
        assert routing.scores is not None
        best = routing.scores.topk(routing.top_k, dim=-1).indices
        chosen, expert = torch.zeros_like(keeps).scatter(1, best, True), best[:, 0]
    mask = routing.valid_mask & (expert < routing.num_experts)  # a token may take no expert
    expert = expert[mask]
    return Observed(
        x=view.x[mask].float(),
        expert=expert,
        kept=keeps[mask].gather(1, expert[:, None]).squeeze(1),
        chosen=chosen[mask],
        scores=None if routing.scores is None else routing.scores[mask],
        domain=domain[mask],
    )


def _joined(parts: list[Observed]) -> Observed:
    def cat(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return Observed(**{field.name: cat(field.name) for field in dataclasses.fields(Observed)})


def _spread(total: int, count: int) -> Tensor:
    """At most `count` indices below `total`, evenly spaced, int64."""
    count = min(count, total)
    return torch.arange(count) * total // max(count, 1)


def _plain(values: Tensor) -> Any:
    """Nested lists of numbers with six decimals."""
    return (values.double() * 1e6).round().div(1e6).tolist()
