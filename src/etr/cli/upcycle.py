"""`etr upcycle`: a dense checkpoint becomes a Mixture-of-Experts model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from etr.cli._options import Source, Target, WithImports, parse
from etr.cli._progress import bytes_progress
from etr.cli._text import print_made
from etr.hf.upcycle import UpcycleConfig, upcycle
from etr.train.checkpoint_folder import find_model
from etr.train.folders import making


@dataclass(frozen=True, kw_only=True)
class UpcycleArguments(UpcycleConfig, WithImports):
    """Which model to upcycle, and into what."""

    source: Source
    """Folder of a dense Llama, Mistral, Qwen2 or Qwen3 model with safetensors."""
    target: Target
    """New folder."""
    max_shard_bytes: int = 4 * 10**9
    """Size from which a new file of weights begins."""
    compare: bool = True
    """Run both models on a few tokens and print the largest difference of their logits. Holds one
    whole model in memory, which upcycling alone does not."""


def run(arguments: list[str]) -> int:
    """Upcycle, and print whether the function is the same."""
    config = parse(UpcycleArguments, "upcycle", arguments)
    with making(Path(config.target)), bytes_progress("upcycling") as progress:
        report = upcycle(
            find_model(config.source),
            config.target,
            config,
            max_shard_bytes=config.max_shard_bytes,
            progress=progress,
            compare=config.compare,
        )
    print_made(report, "the dense model")
    return 0
