"""Text that verbs run through a model, and what they say of a folder that they made of another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from etr.cli._progress import track
from etr.data import Batch, DataConfig, OpenedData, TokenLoader
from etr.hf.convert import TransformReport


@dataclass(frozen=True, kw_only=True)
class OnText:
    """The text of a verb that reads a folder and not a run."""

    calibrate: tuple[str, ...] = ("builtin",)
    """Text to calibrate or measure on, where that is done: "builtin" (installed with the library),
    text files, folders, .jsonl."""
    sequence_length: int = 256
    """Length of its sequences, tokens."""
    batch_size: int = 8
    """Sequences in a batch."""
    num_batches: int = 16
    """Batches to calibrate or measure on."""
    cache_dir: str = "~/.cache/etr"
    """Folder for its tokens; ~ is the home folder."""

    def __post_init__(self) -> None:
        if self.num_batches < 1:
            raise ValueError(f"num_batches={self.num_batches} must be at least 1")

    def data(self, tokenizer: str) -> DataConfig:
        """The text, cut by a tokenizer."""
        return DataConfig(
            data=self.calibrate,
            tokenizer=tokenizer,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            cache_dir=self.cache_dir,
        )

    def batches(self, data: OpenedData, what: str) -> Iterator[Batch]:
        """Batches of the text, under a bar that says `what` is being done."""
        return training_batches(data, self.sequence_length, self.batch_size, self.num_batches, what)


def training_batches(
    data: OpenedData, sequence_length: int, batch_size: int, num_batches: int, what: str
) -> Iterator[Batch]:
    """The first batches of the training text, under a bar that says `what` is being done."""
    loader = TokenLoader(data.dataset, sequence_length=sequence_length, batch_size=batch_size)
    yield from track(islice(loader, num_batches), what, total=num_batches)


def arguments_of(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch as arguments of a model's forward."""
    return {"input_ids": batch.input_ids, "attention_mask": batch.valid_mask.long()}


def print_made(report: TransformReport, source: str) -> None:
    """Say whether the new folder computes what `source` does, and where it is."""
    if report.plan:
        print(report.plan)
    if report.why_ours:
        print(f"in this library's format: {report.why_ours}")
    if report.same_function:
        print(f"computes what {source} does, as long as nothing is dropped")
    else:
        print(f"computes something else than {source}: {report.reason}")
    if report.difference is not None:
        print(report.difference)
    if report.flops is not None and report.source_flops is not None:
        millions = report.flops / 1e6, report.source_flops / 1e6
        print(f"experts take {millions[0]:,.3f} of {millions[1]:,.3f} MFLOP for a token")
    of = "" if report.source_bytes is None else f" of {report.source_bytes / 1e6:,.1f}"
    print(
        f"saved: {report.target} ({report.num_tensors} tensors, {report.num_bytes / 1e6:,.1f}{of} "
        "MB)"
    )
