"""Loss on held-out text, by domain, in the mode the model would be served in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from etr.data import IGNORED, Batch
from etr.hf import EtrForCausalLM
from etr.moe import moe_layers, set_eval_selection
from etr.moe.config import EvalSelection


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Held-out loss of one model.

    Args:
        loss: mean cross-entropy over the domains' tokens, nats per token.
        loss_by_domain: the same for each domain.
        tokens_by_domain: tokens that were predicted.
        kept_fraction: kept pairs over valid tokens * top_k, all layers together.
        selection: how experts selected: threshold, dropless or batch.
    """

    loss: float
    loss_by_domain: dict[str, float]
    tokens_by_domain: dict[str, int]
    kept_fraction: float
    selection: EvalSelection

    def bits_per_byte(self, bytes_per_token: dict[str, float]) -> dict[str, float]:
        """Held-out bits per byte of each domain."""
        return {
            name: loss / math.log(2) / bytes_per_token[name]
            for name, loss in self.loss_by_domain.items()
        }


def effective_selection(model: torch.nn.Module, asked: EvalSelection) -> EvalSelection:
    """The selection that evaluation really uses: threshold needs calibrated thresholds."""
    if asked == "threshold" and not all(layer.has_thresholds() for layer in moe_layers(model)):
        return "dropless"
    return asked


@torch.no_grad()
def evaluate(
    model: EtrForCausalLM,
    batches: Iterable[Batch],
    domains: tuple[str, ...],
    selection: EvalSelection = "threshold",
) -> EvalResult:
    """Mean cross-entropy over held-out batches; the model's mode and selection are restored.

    Args:
        model: evaluated in eval mode on its own device.
        batches: held-out batches, each of one domain's rows.
        domains: names by the batches' domain numbers.
        selection: threshold, dropless, or batch (in which later tokens change earlier ones: not a
            language-model loss).
    Raises:
        ValueError: there is no held-out token.
    """
    was_training = model.training
    before = [layer.eval_selection for layer in moe_layers(model)]
    set_eval_selection(model, selection)
    model.eval()
    device = next(model.parameters()).device
    sums = torch.zeros(len(domains), dtype=torch.float64)
    counts = torch.zeros(len(domains), dtype=torch.int64)
    kept, slots = 0, 0
    try:
        for batch in batches:
            batch = batch.to(device)
            output = model(input_ids=batch.input_ids, attention_mask=batch.valid_mask.long())
            nats = F.cross_entropy(
                output.logits.float().transpose(1, 2),
                batch.labels,
                ignore_index=IGNORED,
                reduction="none",
            )
            sums.index_add_(0, batch.domain.cpu(), nats.double().sum(1).cpu())
            counts.index_add_(0, batch.domain.cpu(), (batch.labels != IGNORED).sum(1).cpu())
            for layer, stats in zip(moe_layers(model), output.routing_stats, strict=True):
                kept += int(stats["num_tokens_per_expert"].sum())
                slots += int(stats["num_valid_tokens"]) * layer.config.top_k
    finally:
        for layer, old in zip(moe_layers(model), before, strict=True):
            layer.eval_selection = old
        model.train(was_training)
    if not int(counts.sum()):
        raise ValueError("no held-out tokens: the data has no held-out documents")
    seen = [d for d in range(len(domains)) if counts[d] > 0]
    return EvalResult(
        loss=float(sums.sum() / counts.sum()),
        loss_by_domain={domains[d]: float(sums[d] / counts[d]) for d in seen},
        tokens_by_domain={domains[d]: int(counts[d]) for d in seen},
        kept_fraction=kept / max(slots, 1),
        selection=effective_selection(model, selection),
    )
