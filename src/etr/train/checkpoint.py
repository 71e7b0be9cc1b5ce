"""Checkpoints: a transformers folder plus what resuming needs, complete or absent.

    step-00000200/
      config.json, tokenizer    as transformers writes them
      model.safetensors         of one process: the folder loads with AutoModelForCausalLM
      shard-*.safetensors       of many: `etr consolidate` makes one model of them
      optimizer/                the optimizer's tensors and the random state
      train_state.json          counters, the loader's place, the options
      manifest.json             size and checksum of all of the above; written last

Whatever number of ranks wrote a checkpoint, any other resumes from it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from etr.files import write_json
from etr.hf import EtrConfig, EtrForCausalLM
from etr.parallel import Ranks, manifest
from etr.parallel.storage import (
    Tensors,
    model_tensors,
    optimizer_tensors,
    read_tensors,
    tensors_changed,
    write_tensors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "step-"
FORMAT = 2
OPTIMIZER = "optimizer"
STATE = "train_state.json"
RNG = "rng"

T = TypeVar("T")


class SaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a run needs beside the model to go on as if it had never stopped.

    Args:
        step: optimizer steps done.
        tokens: tokens seen.
        expert_flops: floating-point operations of the experts so far.
        elapsed_seconds: training time so far.
        loader: state of the token loader.
        fingerprint: options that must be the same on resuming.
    """

    step: int
    tokens: int
    expert_flops: float
    elapsed_seconds: float
    loader: dict[str, Any]
    fingerprint: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a checkpoint holds; tensors are the model's and optimizer's own, or copies.

    Args:
        model: its config is written; of one process, its weights too, from `weights`.
        tokenizer: written beside it.
        weights: as `etr.parallel.storage.model_tensors` names them.
        optimizer: the optimizer's tensors, and the random state as `rng`.
        state: counters and options.
    """

    model: EtrForCausalLM
    tokenizer: PreTrainedTokenizerBase
    weights: Tensors
    optimizer: Tensors
    state: TrainState


def snapshot(
    model: EtrForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
) -> Snapshot:
    """What there is to save now; every rank must call this."""
    return Snapshot(
        model=model,
        tokenizer=tokenizer,
        weights=model_tensors(model),
        optimizer={**optimizer_tensors(model, optimizer), RNG: torch.get_rng_state()},
        state=state,
    )


def write_checkpoint(run: Path, what: Snapshot, keep: int, ranks: Ranks) -> Path:
    """Write ``run/checkpoints/step-N`` under a temporary name, rename it, drop the oldest.

    Args:
        run: the run's folder, the same files on every rank.
        what: to be written.
        keep: newest checkpoints that stay.
        ranks: all of them call this.
    Raises:
        SaveError: on every rank, when any could not write its part. Nothing is left of it.
    """
    target = run / "checkpoints" / f"{PREFIX}{what.state.step:08d}"
    temporary = target.with_name(f".tmp-{target.name}")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / OPTIMIZER).mkdir(parents=True)
        what.tokenizer.save_pretrained(temporary)
        if ranks.size > 1:
            what.model.config.save_pretrained(temporary)
        write_json(temporary / STATE, {"format": FORMAT, **vars(what.state)})

    def write() -> None:
        if ranks.size > 1:
            write_tensors(temporary, what.weights, ranks)
        else:
            what.model.save_pretrained(temporary, state_dict=what.weights)
        write_tensors(temporary / OPTIMIZER, what.optimizer, ranks)

    def finish() -> None:
        write_json(temporary / manifest.NAME, files)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)

    try:
        _together(ranks, lambda: begin() if ranks.is_first else None)
        _together(ranks, write)
        files = _together(ranks, lambda: manifest.describe_files(temporary, ranks))
        _together(ranks, lambda: finish() if ranks.is_first else None)
    except SaveError:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if ranks.is_first:
        for old in list_checkpoints(run)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; whether their files are whole is not looked at."""
    found = (run / "checkpoints").glob(f"{PREFIX}*")
    return sorted(path for path in found if (path / STATE).exists())


def is_divided(checkpoint: Path) -> bool:
    """Whether many ranks wrote it, so that no model can be loaded from it as it is."""
    return any(checkpoint.glob("shard-*.safetensors"))


def load_checkpoint(
    path: Path,
    model: EtrForCausalLM,
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
    ranks: Ranks,
) -> TrainState:
    """Bring model, optimizer and random state back to a checkpoint whose files are whole.

    Raises:
        ValueError: the checkpoint is of another config (the fields are named) or of an unknown
            format.
    """
    state = _read_state(path)
    differ = sorted(
        name
        for name in {*fingerprint, *state.fingerprint}
        if fingerprint.get(name) != state.fingerprint.get(name)
    )
    if differ:
        pairs = ", ".join(
            f"{name} is {state.fingerprint.get(name)!r} there and {fingerprint.get(name)!r} here"
            for name in differ
        )
        raise ValueError(
            f"checkpoint {path} is of another config: {pairs}; use the same options to resume, or "
            "another out folder to start afresh"
        )
    weights = model_tensors(model)
    moments = {**optimizer_tensors(model, optimizer), RNG: torch.get_rng_state()}
    _read(path, weights, ranks)
    _read(path / OPTIMIZER, moments, ranks)
    tensors_changed(model)
    torch.set_rng_state(moments[RNG])
    return state


def consolidate(checkpoint: Path, out: Path) -> None:
    """Make one transformers folder of a checkpoint that many ranks wrote; one process does it.

    Args:
        checkpoint: whole, of any number of ranks.
        out: does not exist yet; gets config, tokenizer and model.safetensors.
    Raises:
        ValueError: `out` exists, or files of the checkpoint are damaged.
    """
    from etr.data import load_tokenizer

    if out.exists():
        raise ValueError(f"out={str(out)!r} exists already; name a new folder")
    alone = Ranks(None)
    damage = manifest.find_damage(checkpoint, alone)
    if damage:
        raise ValueError(f"checkpoint {checkpoint} is damaged: {damage}")
    model = EtrForCausalLM(EtrConfig.from_pretrained(checkpoint))
    _read(checkpoint, model_tensors(model), alone)
    tensors_changed(model)
    temporary = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    load_tokenizer(checkpoint).save_pretrained(temporary)
    os.replace(temporary, out)


def _read(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    try:
        read_tensors(folder, tensors, ranks)
    except CheckpointException as error:
        raise ValueError(f"checkpoint {folder} does not fit the model: {error}") from error


def _together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Do it; where any rank cannot write, every rank raises, naming what each one met."""
    problem = None
    try:
        value = work()
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if not all(map(_is_of_files, causes)):
            raise
        problem = f"rank {ranks.rank}: {'; '.join(sorted(set(map(str, causes))))}"
    except Exception as error:
        if not _is_of_files(error):
            raise
        problem = f"rank {ranks.rank}: {error}"
    found = [text for text in ranks.gather(problem) if text]
    if found:
        raise SaveError("; ".join(found))
    return value


def _is_of_files(error: BaseException) -> bool:
    """Whether the file system refused; Rust libraries say so in words alone."""
    return isinstance(error, OSError | SafetensorError) or "(os error " in str(error)


def _read_state(path: Path) -> TrainState:
    try:
        values = json.loads((path / STATE).read_text())
        number = values.pop("format")
        if number != FORMAT:
            raise ValueError(f"format {number}, this version reads {FORMAT}")
        return TrainState(**values)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} has no usable {STATE}: {error}") from error
