"""`etr sft`: supervised fine-tuning on conversations."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from etr.cli._model import open_any_model
from etr.cli._options import WithImports, parse
from etr.train.folders import making
from etr.train.sft import SftConfig, sft


@dataclass(frozen=True, kw_only=True)
class SftArguments(SftConfig, WithImports):
    """Which model to fine-tune, on what, and how."""

    model: Annotated[str, tyro.conf.Positional]
    """Checkpoint, run's folder, or a transformers model's folder."""


def run(arguments: list[str]) -> int:
    """Fine-tune, save, and print what a person should know."""
    config = parse(SftArguments, "sft", arguments)
    # Of the processes of a launch, the first one writes.
    first = os.environ.get("RANK", "0") == "0"
    with making(Path(config.out)) if first else nullcontext():
        model, tokenizer, _ = open_any_model(config.model)
        result = sft(model, tokenizer, config)
    for note in result.notes:
        print(f"note: {note}")
    first, last = result.rows[0]["loss"], result.rows[-1]["loss"]
    print(f"loss {float(first):.4f} -> {float(last):.4f} in {len(result.rows)} steps")
    print(f"saved: {result.out}")
    return 0
