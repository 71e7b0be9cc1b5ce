"""`etr trace`: which token went to which expert, as a Parquet file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from etr.cli._model import open_any_model
from etr.cli._of_run import objective_for, parse_with_text
from etr.cli._options import WithImports
from etr.cli._progress import track
from etr.cli._tables import make_table
from etr.data import DataConfig, open_data
from etr.hf import FAMILIES
from etr.model import OBJECTIVES
from etr.moe.serving import serving_of
from etr.moe.stats import max_violation
from etr.systems import MEASURES
from etr.trace import Trace, read_trace
from etr.trace.record import record_trace
from etr.trace.sampling import SampledRows
from etr.train.model import find_device


@dataclass(frozen=True, kw_only=True)
class TraceConfig(WithImports):
    """What to trace, and on what."""

    model: Annotated[str, tyro.conf.Positional]
    """Checkpoint, a run's folder, or a folder with a transformers MoE model."""
    out: str | None = None
    """File to write; by default trace.parquet in the model's folder as given."""
    max_tokens: int | None = 32_768
    """Most tokens, in rows spread evenly over the held-out text; None for all of it."""
    selection: str = "threshold"
    """How experts select: threshold, dropless, batch or another name in SERVING, perhaps with
    options; layers of this library only."""
    objective: str | None = None
    """What the model was trained on, e.g. causal; by default what its run says. With
    block_diffusion each row is two sequences: its noised blocks, and the clean text."""
    segment: int = 16
    """Window of the routing consistency (SRP, SCH) that is printed, tokens."""
    measures: tuple[str, ...] = ()
    """What to print of each layer, with options: srp:segment=8 sch:segment=8,size=2. By default
    both, with a window of --segment and a cache of twice top_k experts."""
    device: str = "auto"
    """auto, cpu, cuda, npu, ..."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text; its held-out documents are used. That of the run by default. The tokenizer is the
    model's own."""

    def __post_init__(self) -> None:
        serving_of(self.selection, "selection")
        if self.objective is not None:
            OBJECTIVES.parse(self.objective)
        for text in self.measures:
            MEASURES.parse(text)
        for name in ("max_tokens", "segment"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1, tokens")


def run(arguments: list[str]) -> int:
    """Trace, write the file, and print a summary."""
    config = parse_with_text(TraceConfig, "trace", arguments, lambda c: (c.model,))
    device = find_device(config.device)
    model, tokenizer, folder = open_any_model(config.model, FAMILIES)
    model.to(device)
    data = open_data(dataclasses.replace(config.data, tokenizer=str(folder)))
    if data.dataset.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {data.dataset.vocab_size} tokens, the model "
            f"vocab_size={model.config.vocab_size}: they do not belong together"
        )
    batches = SampledRows(
        dataset=data.dataset,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        max_tokens=config.max_tokens,
    )
    out = Path(config.model) / "trace.parquet" if config.out is None else Path(config.out)
    record_trace(
        model,
        track(batches, "tracing", total=len(batches)),
        out,
        domains=data.dataset.domains,
        tokenizer=tokenizer,
        selection=config.selection,
        source=str(folder),
        objective=objective_for(config.objective, config.model, tokenizer),
    )
    trace = read_trace(out)
    Console().print(summary(trace, config.segment, config.measures))
    info = trace.info
    print(f"{trace.num_tokens:,} tokens, {info.router} router, {info.selection} selection: {out}")
    return 0


def summary(trace: Trace, segment: int, measures: Sequence[str] = ()) -> Table:
    """Load and consistency of each layer.

    Args:
        trace: what to sum up.
        segment: window of the consistency, tokens, where no measures are named.
        measures: texts of `MEASURES`.
    """
    experts, cache = trace.info.num_experts, min(2 * trace.info.top_k, trace.info.num_experts)
    texts = measures or (f"srp:segment={segment}", f"sch:segment={segment},size={cache}")
    chosen = [MEASURES.parse(text) for text in texts]
    table = make_table("layer", "kept", "MaxVio", *(measure.title for measure in chosen))
    for index in range(trace.info.num_layers):
        layer = trace.layer(index)
        choices = layer.counts(experts)
        kept = layer.counts(experts, kept=True).sum() / max(choices.sum(), 1)
        found = (measure.of(layer.experts, layer.sequence, experts) for measure in chosen)
        table.add_row(
            str(index),
            f"{kept:.1%}",
            f"{float(max_violation(torch.from_numpy(choices))):.2f}",
            *(f"{value:.3f}" for value in found),
        )
    return table
