"""`etr transform`: what a method makes of a checkpoint, as a new folder of the same format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import tyro

from etr.cli._options import parse
from etr.cli._progress import bytes_progress, track
from etr.data import DataConfig, TokenLoader, open_data
from etr.files import read_json
from etr.hf.transform import transform
from etr.model.transform import TRANSFORMS
from etr.train.checkpoint_folder import find_model
from etr.train.folders import making


@dataclass(frozen=True, kw_only=True)
class TransformArguments:
    """What to make of which folder."""

    name: Annotated[str, tyro.conf.Positional]
    """Transform, perhaps with options: renumber."""
    source: Annotated[str, tyro.conf.Positional]
    """Model folder with safetensors, of this library or of a known family."""
    target: Annotated[str, tyro.conf.Positional]
    """New folder."""
    plan: str | None = None
    """JSON file with the plan: of etr plan for renumber, else transform.json of an earlier result,
    as it is or changed. By default the method plans, on text where it measures."""
    calibrate: tuple[str, ...] = ("builtin",)
    """Text to measure on: "builtin" (installed with the library), text files, folders, .jsonl."""
    sequence_length: int = 256
    """Length of its sequences, tokens."""
    batch_size: int = 8
    """Sequences in a batch."""
    num_batches: int = 16
    """Batches to measure on."""
    cache_dir: str = "~/.cache/etr"
    """Folder for its tokens; ~ is the home folder."""
    max_shard_bytes: int = 4 * 10**9
    """Size from which a new file of weights begins."""
    compare: bool = True
    """Run both models on a few tokens and print the largest difference of their logits; where the
    method promises the same function, refuse more than rounding. Holds one whole model in memory,
    which transforming alone does not."""

    def __post_init__(self) -> None:
        TRANSFORMS.parse(self.name)
        if self.num_batches < 1:
            raise ValueError(f"num_batches={self.num_batches} must be at least 1")


def run(arguments: list[str]) -> int:
    """Transform, and print what became of the function."""
    config = parse(TransformArguments, "transform", arguments)
    method = TRANSFORMS.parse(config.name)
    plan = None
    if config.plan is not None:
        plan = read_json(Path(config.plan))
        if isinstance(plan, dict) and plan.keys() >= {"transform", "plan"}:
            plan = plan["plan"]
    with making(Path(config.target)):
        source = find_model(config.source)
        with bytes_progress("transforming") as progress:
            report = transform(
                source,
                config.target,
                method,
                plan=plan,
                batches=_text(config, source) if method.measures and plan is None else (),
                max_shard_bytes=config.max_shard_bytes,
                progress=progress,
                compare=config.compare,
            )
    if report.same_function:
        print("computes what the source does, as long as nothing is dropped")
    else:
        print(f"computes something else than the source: {report.reason}")
    if report.difference is not None:
        print(report.difference)
    print(
        f"saved: {report.target} ({report.num_tensors} tensors, {report.num_bytes / 1e6:,.1f} MB)"
    )
    return 0


def _text(config: TransformArguments, source: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Batches as arguments of the model's forward."""
    data = open_data(
        DataConfig(
            data=config.calibrate,
            tokenizer=str(source),
            sequence_length=config.sequence_length,
            batch_size=config.batch_size,
            cache_dir=config.cache_dir,
        )
    )
    loader = TokenLoader(
        data.dataset, sequence_length=config.sequence_length, batch_size=config.batch_size
    )
    for batch in track(islice(loader, config.num_batches), "measuring", total=config.num_batches):
        yield {"input_ids": batch.input_ids, "attention_mask": batch.valid_mask.long()}
