"""`etr consolidate`: one model of a checkpoint that many ranks wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from etr.cli._options import parse
from etr.train.checkpoint import consolidate, list_checkpoints


@dataclass(frozen=True, kw_only=True)
class ConsolidateConfig:
    """What to read and where to write."""

    run: Annotated[str, tyro.conf.Positional]
    """Checkpoint, or a run's folder, whose newest checkpoint is taken."""
    out: Annotated[str, tyro.conf.Positional]
    """New folder; it loads with AutoModelForCausalLM and with every verb that takes a model."""


def run(arguments: list[str]) -> int:
    """Read the parts, write the whole."""
    config = parse(ConsolidateConfig, "consolidate", arguments)
    folder = Path(config.run)
    if not folder.is_dir():
        raise FileNotFoundError(f"{config.run} is no folder; give a checkpoint or a run's folder")
    checkpoint = [folder, *list_checkpoints(folder)][-1]
    consolidate(checkpoint, Path(config.out))
    print(f"{config.out} is the model of {checkpoint}")
    return 0
