"""Checkpoints: a transformers folder plus what resuming needs, complete or absent.

    step-00000200/
      config.json, tokenizer    as transformers writes them
      model.safetensors         of one process: the folder loads with AutoModelForCausalLM
      shard-*.safetensors       of many: `etr consolidate` makes one model of them
      optimizer/                the optimizer's tensors and the random state
      train_state.json          counters, the loader's place, the options
      manifest.json             size and checksum of all of the above; written last

Whatever number of ranks wrote a checkpoint, any other resumes from it. Files that the manifest
does not list are not read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from etr.files import (
    put_folder,
    remove_folder,
    temporary_sibling,
    whole_folder,
    write_json,
)
from etr.hf import EtrConfig, EtrForCausalLM
from etr.moe.notice import warn
from etr.parallel import Ranks, manifest
from etr.parallel.storage import (
    Tensors,
    model_tensors,
    optimizer_tensors,
    read_tensors,
    tensors_changed,
    write_tensors,
)
from etr.train.checkpoint_folder import (
    FOLDER,
    FORMAT,
    OPTIMIZER,
    PREFIX,
    STATE,
    TrainState,
    changed_options,
    find_model,
    is_checkpoint,
    list_checkpoints,
    read_state,
    step_of,
)
from etr.train.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RNG = "rng"

T = TypeVar("T")


class SaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """All that a checkpoint holds; tensors are the model's and optimizer's own, or copies."""

    model: EtrForCausalLM
    """Model whose config is written; of one process, its weights too, from `weights`."""
    tokenizer: PreTrainedTokenizerBase
    """Tokenizer that is written beside it."""
    weights: Tensors
    """Weights by the names of `etr.parallel.storage.model_tensors`."""
    optimizer: Tensors
    """The optimizer's tensors, and the random state as `rng`."""
    state: TrainState
    """Counters and options."""


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
    target = run / FOLDER / f"{PREFIX}{what.state.step:08d}"
    temporary = ranks.from_first(temporary_sibling(target))

    def begin() -> None:
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
        put_folder(temporary, target)

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
        # Later ones are damaged, or the run would have gone on from them: they count for nothing.
        whole = [path for path in list_checkpoints(run) if step_of(path) <= what.state.step]
        for old in whole[:-keep]:
            remove_folder(old)
    return target


def load_checkpoint(
    path: Path,
    model: EtrForCausalLM,
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
    ranks: Ranks,
) -> TrainState:
    """Bring model, optimizer and random state back to a checkpoint whose files are whole.

    Files that its manifest does not list are named in a warning and not read.

    Raises:
        ValueError: the checkpoint is of another config (the fields are named).
    """
    state = read_state(path)
    # Options that a checkpoint of earlier does not know were at their defaults.
    stored = {**TrainConfig().fingerprint(), **state.fingerprint}
    changed = changed_options(stored, fingerprint)
    if changed:
        pairs = ", ".join(
            f"{name} is {a!r} there and {b!r} here" for name, (a, b) in changed.items()
        )
        raise ValueError(
            f"checkpoint {path} is of another config: {pairs}; use the same options to resume, or "
            "another out folder to start afresh"
        )
    if ranks.is_first and (more := manifest.unlisted(path)):
        warn(
            f"{path} holds files that its {manifest.NAME} does not list; they are not read: "
            f"{', '.join(more)}"
        )
    weights = model_tensors(model)
    moments = {**optimizer_tensors(model, optimizer), RNG: torch.get_rng_state()}
    _read(path, "", weights, ranks)
    _read(path, f"{OPTIMIZER}/", moments, ranks)
    tensors_changed(model)
    torch.set_rng_state(moments[RNG])
    return state


def rewrite_model(source: Path, target: Path, model: EtrForCausalLM) -> None:
    """Write a copy of a model's folder with other weights, whole or not at all.

    Args:
        source: a model's folder; the copy of a checkpoint is a checkpoint, with its own manifest.
        target: the copy, which may take the place of `source`.
        model: whose weights are written.
    """
    source, target = source.resolve(), target.resolve()
    is_one = is_checkpoint(source)
    names = [*manifest.read_manifest(source)] if is_one else _files_of_model(source)
    with whole_folder(target, replace=target == source) as temporary:
        for name in names:
            if not _holds_weights(name):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, temporary / name)
        model.save_pretrained(temporary)
        if is_one:
            files = manifest.describe_files(temporary, Ranks(None))
            write_json(temporary / manifest.NAME, files)


def consolidate(path: Path, out: Path) -> Path:
    """Make one transformers folder of a checkpoint that many ranks wrote; one process does it.

    Args:
        path: a checkpoint of any number of ranks, or a run's folder, whose newest is taken.
        out: does not exist yet; gets config, tokenizer and model.safetensors.
    Returns:
        The checkpoint.
    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: `out` exists, or files of the checkpoint are damaged.
    """
    from etr.data import load_tokenizer

    if out.exists():
        raise ValueError(f"out={str(out)!r} exists already; name a new folder")
    checkpoint = find_model(path)
    model = EtrForCausalLM(EtrConfig.from_pretrained(checkpoint))
    _read(checkpoint, "", model_tensors(model), Ranks(None))
    tensors_changed(model)
    with whole_folder(out) as temporary:
        model.save_pretrained(temporary)
        load_tokenizer(checkpoint).save_pretrained(temporary)
    return checkpoint


def _files_of_model(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _holds_weights(name: str) -> bool:
    """Whether a file at the top of a model's folder holds weights, or says where they are."""
    endings = (".safetensors", ".bin", ".index.json")
    return "/" not in name and name.endswith(endings)


def _read(checkpoint: Path, folder: str, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Read tensors from the safetensors that the manifest lists in one of its folders."""
    names = [
        name
        for name in manifest.read_manifest(checkpoint)
        if name.endswith(".safetensors") and name.rpartition("/")[0] == folder.rstrip("/")
    ]
    try:
        read_tensors(checkpoint, names, tensors, ranks)
    except CheckpointException as error:
        raise ValueError(f"checkpoint {checkpoint} does not fit the model: {error}") from error


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
