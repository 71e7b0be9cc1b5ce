"""`etr calibrate`: thresholds from text."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated

import tyro

from etr.cli._model import open_model
from etr.cli._options import parse
from etr.cli._progress import track
from etr.data import DataConfig, TokenLoader, open_data
from etr.evaluate import calibrate
from etr.hf import EtrForCausalLM


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Which model to calibrate, and on what."""

    model: Annotated[str, tyro.conf.Positional]
    """Checkpoint, or a run's folder."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text; its training documents are used. The tokenizer is the model's own."""
    num_batches: int = 64
    """Batches to run; make them as large as in training."""
    save_to: str | None = None
    """Folder for the calibrated model; by default the model's own folder is updated."""

    def __post_init__(self) -> None:
        if self.num_batches < 1:
            raise ValueError(f"num_batches={self.num_batches} must be at least 1")


def run(arguments: list[str]) -> int:
    """Calibrate, save, and print what each layer keeps."""
    config = parse(CalibrateConfig, "calibrate", arguments)
    model, _, folder = open_model(config.model)
    data = open_data(dataclasses.replace(config.data, tokenizer=str(folder)))
    loader = TokenLoader(
        data.dataset,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
    )
    batches = track(islice(loader, config.num_batches), "calibrating", total=config.num_batches)
    kept = calibrate(model, batches)
    target = folder if config.save_to is None else Path(config.save_to)
    save_beside(model, folder, target)
    for layer, share in enumerate(kept):
        print(f"layer {layer}: thresholds keep {share:.1%} of choices")
    print(f"saved: {target}")
    return 0


def save_beside(model: EtrForCausalLM, source: Path, target: Path) -> None:
    """Write a copy of a model folder with new weights, complete or not at all."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    for old in temporary.glob("*.safetensors"):
        old.unlink()
    model.save_pretrained(temporary)
    replaced = target.with_name(f".old-{target.name}")
    if target.exists():
        os.replace(target, replaced)
    os.replace(temporary, target)
    shutil.rmtree(replaced, ignore_errors=True)
