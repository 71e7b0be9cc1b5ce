"""`etr evaluate`: held-out bits per byte by domain."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from etr.cli._model import open_model
from etr.cli._options import parse
from etr.data import DataConfig, held_out_batches, open_data
from etr.evaluate import evaluate
from etr.moe.config import EvalSelection


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to evaluate, and on what."""

    model: Annotated[str, tyro.conf.Positional]
    """Checkpoint, or a run's folder."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text; its held-out documents are used. The tokenizer is the model's own."""
    selection: EvalSelection = "threshold"
    """How experts select; batch lets later tokens change earlier ones and is no honest loss."""
    max_tokens_per_domain: int | None = None
    """Most tokens of each domain; all by default."""


def run(arguments: list[str]) -> int:
    """Evaluate and print a table."""
    config = parse(EvaluateConfig, "evaluate", arguments)
    model, _, folder = open_model(config.model)
    data = open_data(dataclasses.replace(config.data, tokenizer=str(folder)))
    batches = held_out_batches(
        data.dataset,
        config.data.sequence_length,
        config.data.batch_size,
        config.max_tokens_per_domain,
    )
    result = evaluate(model, batches, data.dataset.domains, config.selection)
    bits = result.bits_per_byte(data.dataset.bytes_per_token)
    print(f"{folder}: {result.selection} selection, kept {result.kept_fraction:.3f}")
    table = Table()
    for name in ("domain", "tokens", "nats/token", "bits/byte"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for name, loss in result.loss_by_domain.items():
        table.add_row(
            name, f"{result.tokens_by_domain[name]:,}", f"{loss:.4f}", f"{bits[name]:.4f}"
        )
    tokens = sum(result.tokens_by_domain.values())
    all_bytes = sum(
        count * data.dataset.bytes_per_token[name]
        for name, count in result.tokens_by_domain.items()
    )
    total_bits = result.loss * tokens / math.log(2) / all_bytes
    table.add_section()
    table.add_row("all", f"{tokens:,}", f"{result.loss:.4f}", f"{total_bits:.4f}")
    Console().print(table)
    if result.selection == "batch":
        print("batch selection: later tokens change earlier ones; do not report this as a loss")
    return 0
