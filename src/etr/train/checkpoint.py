"""Checkpoints: a transformers folder plus what resuming needs, complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from etr.hf import EtrForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREFIX = "step-"
FORMAT = 1


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


def save_checkpoint(
    run: Path,
    model: EtrForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    keep: int,
) -> Path:
    """Write ``run/checkpoints/step-N`` under a temporary name, rename it, drop the oldest.

    The folder loads with ``AutoModelForCausalLM.from_pretrained`` and holds ``optimizer.pt`` and
    ``train_state.json`` beside the model.
    """
    folder = run / "checkpoints"
    target = folder / f"{PREFIX}{state.step:08d}"
    temporary = folder / f".tmp-{target.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    torch.save(
        {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()},
        temporary / "optimizer.pt",
    )
    values = {"format": FORMAT, **vars(state)}
    (temporary / "train_state.json").write_text(json.dumps(values, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob(f"{PREFIX}*")
    return sorted(path for path in found if (path / "train_state.json").exists())


def load_checkpoint(
    path: Path,
    model: EtrForCausalLM,
    optimizer: torch.optim.Optimizer,
    fingerprint: dict[str, Any],
) -> TrainState:
    """Bring model, optimizer and random state back to a checkpoint.

    Raises:
        ValueError: the checkpoint is of another config (the fields are named), damaged, or of an
            unknown format.
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
    try:
        weights = load_file(path / "model.safetensors")
        extra = torch.load(path / "optimizer.pt", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"checkpoint {path} is damaged ({error}); delete the folder to resume from the one "
            "before"
        ) from error
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # Tied weights are saved once.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wrong = sorted({*missing} - tied) + sorted(unexpected)
    if wrong:
        raise ValueError(f"checkpoint {path} does not fit the model: {', '.join(wrong[:5])}")
    model.tie_weights()
    optimizer.load_state_dict(extra["optimizer"])
    torch.set_rng_state(extra["rng"])
    return state


def _read_state(path: Path) -> TrainState:
    try:
        values = json.loads((path / "train_state.json").read_text())
        number = values.pop("format")
        if number != FORMAT:
            raise ValueError(f"format {number}, this version reads {FORMAT}")
        return TrainState(**values)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} has no usable train_state.json: {error}") from error
