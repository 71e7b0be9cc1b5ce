"""Loss on held-out text, by domain, in the mode the model would be served in."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from etr.data import Batch
from etr.model.objective import IGNORED, Causal, Example, Objective, draws
from etr.moe import MoE, moe_layers, selecting
from etr.moe.layers import effective_serving
from etr.moe.stats import kept_share
from etr.parallel import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Held-out loss of one model."""

    loss: float
    """Mean over the domains' tokens, nats per token."""
    loss_by_domain: dict[str, float]
    """The same for each domain."""
    tokens_by_domain: dict[str, int]
    """Tokens that were predicted."""
    kept_fraction: float
    """Kept pairs over those that could have been kept (`routing_shares`), all layers together;
    1 without layers."""
    selection: str
    """How experts selected: a serving policy as text, e.g. threshold."""
    error: float | None = None
    """Standard error of `loss` over rows of text; None for one row."""
    error_by_domain: dict[str, float | None] = field(default_factory=dict)
    """The same for each domain."""
    kept_per_choice: float = 1.0
    """Kept pairs over valid tokens * top_k, all layers together."""
    counted: dict[str, float] = field(default_factory=dict)
    """What banks count beside (`Bank.counters`): means of their layers' kept pairs, by name."""
    rows: tuple[tuple[float, int], ...] = ()
    """Summed nats, and tokens, of each row of text, in order."""
    digest: str = ""
    """Of these rows' token ids: rows of two results pair where it is the same."""
    bound: bool = False
    """Whether losses are upper bounds of the text's nats."""
    asked_loss: float | None = None
    """Mean cross-entropy of the places that had to be found, nats, where places weigh unequally."""

    def bits_per_byte(self, bytes_per_token: dict[str, float]) -> dict[str, float]:
        """Held-out bits per byte of each domain."""
        return {
            name: loss / math.log(2) / bytes_per_token[name]
            for name, loss in self.loss_by_domain.items()
        }


def effective_selection(model: nn.Module, asked: str) -> str:
    """The selection that evaluation really uses: threshold needs calibrated thresholds."""
    return effective_serving(model, asked)[0].text


def describe_selection(model: nn.Module, asked: str, objective: Objective | None = None) -> str:
    """How experts select in evaluation, in words; says where it is not what was asked for."""
    if not moe_layers(model):
        return "no experts that select"
    asked, reason = (objective or Causal()).served_by(asked)
    used, refused = effective_serving(model, asked)
    reason = refused or reason
    return f"{used.text} selection" + ("" if reason is None else f": {reason}")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    domains: tuple[str, ...],
    selection: str = "threshold",
    *,
    ranks: Ranks | None = None,
    objective: Objective | None = None,
) -> EvalResult:
    """Mean loss over held-out batches; the model's mode and selection are restored.

    Args:
        model: a language model, with layers of this library or none, on its own device.
        batches: held-out batches, each of one domain's rows.
        domains: names by the batches' domain numbers.
        selection: of `etr.moe.SERVING`, as text; by batch, later tokens change earlier ones.
        ranks: each runs its rows of every batch; the result is that of one process, on all of them.
        objective: what the model was trained on; None for the next token.
    Raises:
        ValueError: there is no held-out token.
    """
    ranks, objective = ranks or Ranks(None), objective or Causal()
    weight, layers = next(model.parameters()), moe_layers(model)
    selection = objective.served_by(selection)[0]
    nats_of_rows, tokens_of_rows, domain_of_rows = list[Tensor](), list[Tensor](), list[Tensor]()
    pairs, asked, digest = _Pairs(layers), [0.0] * 2, hashlib.sha256()
    with selecting(model, selection):
        for number, batch in enumerate(batches, 1):
            log.info("held-out batch %d", number)
            digest.update(_ids(batch))
            own = _own_rows(len(batch.input_ids), ranks)
            text, drawn = batch.to(weight.device).text(), draws("held out", number)
            example = objective.example(text, drawn).rows(own)
            output = model(**example.arguments(weight.dtype))
            nats = objective.losses(output.logits, example).view_as(example.labels)
            nats_of_rows.append(nats.double().sum(1).cpu())
            asked = _added(asked, _asked(nats, example))
            tokens_of_rows.append(example.counted.sum(1).cpu())
            domain_of_rows.append(batch.domain[own])
            pairs.add(output)
    _refuse_nothing(ranks.gather(tokens_of_rows))
    parts = (nats_of_rows, tokens_of_rows, domain_of_rows)
    nats, tokens, domain = (torch.cat(ranks.gather(torch.cat(rows))) for rows in parts)
    kept, slots, choices = pairs.over(ranks)
    seen = {n: m for i, n in enumerate(domains) if int(tokens[m := domain == i].sum())}
    return EvalResult(
        loss=float(nats.sum() / tokens.sum()),
        loss_by_domain={n: float(nats[m].sum() / tokens[m].sum()) for n, m in seen.items()},
        tokens_by_domain={n: int(tokens[m].sum()) for n, m in seen.items()},
        kept_fraction=kept_share(kept, slots) if slots else 1.0,
        kept_per_choice=kept / choices if choices else 1.0,
        counted=pairs.means(ranks),
        selection=effective_selection(model, selection),
        error=ratio_error(nats, tokens),
        error_by_domain={n: ratio_error(nats[m], tokens[m]) for n, m in seen.items()},
        rows=tuple(zip(nats.tolist(), tokens.tolist(), strict=True)),
        digest=digest.hexdigest(),
        bound=objective.bound,
        asked_loss=_mean(*ranks.sum_numbers(asked)),
    )


def _ids(batch: Batch) -> bytes:
    """Token ids and labels row by row, which are the same however many rows a batch has."""
    return torch.stack([batch.input_ids, batch.labels], 1).cpu().numpy().tobytes()


def _refuse_nothing(tokens: Iterable[Iterable[Tensor]]) -> None:
    if not any(int(rows.sum()) for part in tokens for rows in part):
        raise ValueError("no held-out tokens: the data has no held-out documents")


def _added(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _asked(nats: Tensor, example: Example) -> tuple[float, float]:
    """Nats of places with a label, whatever they weigh, and how many; none where all weigh 1."""
    if example.weight is None:
        return 0.0, 0.0
    found = nats.double() / example.weight.clamp_min(torch.finfo(torch.float32).tiny)
    asked = example.labels != IGNORED
    return float(found[asked].sum()), float(asked.sum())


class _Pairs:
    """Sums over batches of all layers' pairs, and of what their banks count of the kept ones."""

    def __init__(self, layers: Sequence[MoE]) -> None:
        self._layers, self._sums = layers, [0.0] * 3
        self._counted = {name: [0.0] * 2 for layer in layers for name in layer.bank.counted}

    def add(self, output: Any) -> None:
        """What a forward of the model counted."""
        stats_of_layers = output.routing_stats if self._layers else []
        for layer, stats in zip(self._layers, stats_of_layers, strict=True):
            kept = int(stats["num_tokens_per_expert"].sum())
            most = int(stats["num_valid_tokens"]) * layer.config.top_k
            self._sums = _added(self._sums, (kept, int(stats["num_slots"]), most))
            for name in layer.bank.counted:
                self._counted[name] = _added(self._counted[name], (float(stats[name]), kept))

    def over(self, ranks: Ranks) -> tuple[int, ...]:
        """Pairs that were kept, that could have been, and that tokens may choose at most."""
        return tuple(map(int, ranks.sum_numbers(self._sums)))

    def means(self, ranks: Ranks) -> dict[str, float]:
        """What banks count of a kept pair, by name; what was never counted is left out."""
        found = {name: ranks.sum_numbers(pair) for name, pair in self._counted.items()}
        return {name: total / count for name, (total, count) in found.items() if count}


def _own_rows(count: int, ranks: Ranks) -> slice:
    """This rank's rows, perhaps none: every rank must run the model on every batch."""
    return slice(count * ranks.rank // ranks.size, count * (ranks.rank + 1) // ranks.size)


def ratio_error(nats: Tensor, tokens: Tensor) -> float | None:
    """Standard error of summed nats over summed tokens, rows being the sample.

    Args:
        nats, tokens: sums of each row, [R].
    """
    rows = len(nats)
    if rows < 2:
        return None
    rest = nats - tokens * (nats.sum() / tokens.sum())
    return float((rest.square().sum() * rows / (rows - 1)).sqrt() / tokens.sum())
