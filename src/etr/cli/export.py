"""`etr export`: a model for engines that know only linear routers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.cli._model import open_model
from etr.cli._of_run import parse_with_text
from etr.cli._options import Source, Target, WithImports
from etr.cli._progress import bytes_progress
from etr.data import IGNORED, Batch, DataConfig, open_data
from etr.evaluate.held_out import effective_selection
from etr.hf.loading import load_causal
from etr.hf.plain import divides_by_norm, export_plain, mean_inverse_norms
from etr.moe import moe_layers, set_eval_selection
from etr.train.diagnose import mixed_batches
from etr.train.folders import making


@dataclass(frozen=True, kw_only=True)
class ExportConfig(WithImports):
    """Which model to export, and where to."""

    source: Source
    """Checkpoint, or a run's folder."""
    target: Target
    """New folder."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text by which norms, losses and the difference of logits are measured; its held-out part is
    read. That of the run by default. The tokenizer is the model's own."""
    num_batches: int = 8
    """Batches of it, about; every domain gives as much."""
    max_shard_bytes: int = 4 * 10**9
    """Size from which a new file of weights begins."""

    def __post_init__(self) -> None:
        if self.num_batches < 1:
            raise ValueError(f"num_batches={self.num_batches} must be at least 1")


def run(arguments: list[str]) -> int:
    """Export, and print what serving it costs."""
    # Earlier versions asked for --plain, the one kind of export that there is.
    wanted = [argument for argument in arguments if argument != "--plain"]
    config = parse_with_text(ExportConfig, "export", wanted, lambda c: (c.source,))
    with making(Path(config.target)):
        return _export(config)


def _export(config: ExportConfig) -> int:
    model, _, folder = open_model(config.source)
    text = dataclasses.replace(config.data, tokenizer=str(folder))
    size = (text.sequence_length, text.batch_size)
    num_tokens = config.num_batches * text.sequence_length * text.batch_size
    batches = mixed_batches(open_data(text).dataset, *size, num_tokens)
    norms = None
    if divides_by_norm(moe_layers(model)[0].config.router_config):
        norms = mean_inverse_norms(model, ({"input_ids": b.input_ids} for b in batches))
    with bytes_progress("exporting") as progress:
        report = export_plain(
            folder,
            config.target,
            inverse_norms=norms,
            max_shard_bytes=config.max_shard_bytes,
            progress=progress,
        )
    served = load_causal(report.target)
    _say(model, served, batches)
    exact = "computes what the model does dropless" if report.same_function else report.reason
    print(f"{exact}\nsaved: {report.target} ({report.family})")
    return 0


@torch.no_grad()
def _say(model: Any, served: Any, batches: list[Batch]) -> None:
    """Held-out losses of the model as it is, dropless, and as it is served."""
    selection = effective_selection(model, "threshold")
    logits: dict[str, list[Tensor]] = {}
    ways: tuple[str, ...] = (selection, "dropless")
    for way in ways:
        set_eval_selection(model, way)
        logits[way] = [model(input_ids=batch.input_ids).logits for batch in batches]
    logits["plain"] = [served(input_ids=batch.input_ids).logits for batch in batches]
    for name, values in logits.items():
        print(f"held-out loss {name:>9}: {_loss(values, batches):.4f} nats a token")
    pairs = zip(logits["dropless"], logits["plain"], strict=True)
    difference = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
    print(f"logits of dropless and plain differ by at most {difference:.2e}")


def _loss(logits: list[Tensor], batches: list[Batch]) -> float:
    total = count = 0.0
    for values, batch in zip(logits, batches, strict=True):
        labels = batch.labels.flatten()
        total += float(
            F.cross_entropy(
                values.float().flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum"
            )
        )
        count += int((labels != IGNORED).sum())
    return total / count
