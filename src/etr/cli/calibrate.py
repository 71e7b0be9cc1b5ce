"""`etr calibrate`: thresholds from text."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from etr.cli._model import open_model
from etr.cli._of_run import parse_with_text, run_at
from etr.cli._options import WithImports
from etr.cli._text import training_batches
from etr.data import DataConfig, open_data
from etr.evaluate import calibrate
from etr.train.checkpoint import rewrite_model
from etr.train.folders import making, writing


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(WithImports):
    """Which model to calibrate, and on what."""

    model: Annotated[str, tyro.conf.Positional]
    """Checkpoint, or a run's folder."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text; its training documents are used. The run's own by default. The tokenizer is the
    model's."""
    num_batches: int = 64
    """Batches to run; make them as large as in training."""
    save_to: str | None = None
    """New folder for the calibrated model; by default it takes the place of the model itself, and a
    run goes on from it."""

    def __post_init__(self) -> None:
        if self.num_batches < 1:
            raise ValueError(f"num_batches={self.num_batches} must be at least 1")


def run(arguments: list[str]) -> int:
    """Calibrate, save, and print what each layer keeps."""
    config = parse_with_text(CalibrateConfig, "calibrate", arguments, lambda c: (c.model,))
    with _held(config):
        model, _, folder = open_model(config.model)
        target = folder if config.save_to is None else Path(config.save_to)
        data = open_data(dataclasses.replace(config.data, tokenizer=str(folder)))
        size = (config.data.sequence_length, config.data.batch_size, config.num_batches)
        kept = calibrate(model, training_batches(data, *size, "calibrating"))
        rewrite_model(folder, target, model)
    for layer, share in enumerate(kept):
        print(f"layer {layer}: thresholds keep {share:.1%} of choices")
    print(f"saved: {target}")
    return 0


def _held(config: CalibrateConfig) -> AbstractContextManager[None]:
    """Hold what is written to: a new folder, a run, or a model's folder."""
    if config.save_to is not None:
        if Path(config.save_to).exists():
            raise ValueError(f"save_to={config.save_to!r} exists already; name a new folder")
        return making(Path(config.save_to))
    run = run_at(config.model)
    return making(Path(config.model)) if run is None else writing(run)
