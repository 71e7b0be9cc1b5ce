"""`etr consolidate`: one model of a checkpoint that many ranks wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from etr.cli._options import parse
from etr.train.checkpoint import consolidate
from etr.train.folders import making


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
    out = Path(config.out)
    with making(out):
        checkpoint = consolidate(Path(config.run), out)
    print(f"{config.out} is the model of {checkpoint}")
    return 0
