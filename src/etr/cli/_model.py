"""Opening a trained model from a checkpoint or a run's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etr.data import load_tokenizer
from etr.files import read_object
from etr.hf import EtrForCausalLM, load_pretrained
from etr.hf.composed import is_composed, member_folder
from etr.hf.loading import load_causal
from etr.methods import told_to_import
from etr.train.checkpoint_folder import find_model, is_divided, list_checkpoints, run_of
from etr.train.config import imports_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


log = logging.getLogger(__name__)


def open_model(
    path: str, load: Callable[[Path], EtrForCausalLM] = load_pretrained
) -> tuple[EtrForCausalLM, PreTrainedTokenizerBase, Path]:
    """Model in eval mode, its tokenizer, and the folder they came from.

    Args:
        path: a checkpoint, or a run's folder, whose newest checkpoint is taken.
        load: makes the model of the checkpoint's folder.
    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder holds no model of this library, or a damaged checkpoint.
    """
    if is_composed(path):
        raise ValueError(
            f"{path} holds several models that answer as one, which etr generate alone takes; give "
            f"one of them: {member_folder(path, 0)}"
        )
    log.info("reading the model in %s", path)
    folder = find_model(path)
    if is_divided(folder):
        raise ValueError(
            f"{folder} was written by many ranks; make one model of it first: etr consolidate "
            f"{path} NEW_FOLDER"
        )
    run = run_of(folder)
    with told_to_import(path, () if run is None else imports_of(run)):
        model = load(folder)
    return model, load_tokenizer(folder), folder


def open_any_model(
    path: str, known: Container[str] | None = None
) -> tuple[Any, PreTrainedTokenizerBase, Path]:
    """A model of this library or of transformers in eval mode, its tokenizer, and their folder.

    Weights come from safetensors alone, and no code of the folder runs.

    Args:
        path: a checkpoint, a run's folder, or a transformers model's folder.
        known: model types of transformers to take; all by default.
    Raises:
        FileNotFoundError: no such folder, or no weights or tokenizer in it.
        ValueError: a model of another type, damaged weights, or weights of another config.
    """
    folder = Path(path)
    model_type = None if list_checkpoints(folder) else _model_type(folder)
    if model_type in (None, "etr") or (known is not None and model_type not in known):
        return open_model(path)
    log.info("reading the model in %s", path)
    return load_causal(folder), load_tokenizer(folder), folder


def _model_type(folder: Path) -> str | None:
    """The model type in the folder's config.json; None where it has none or is not there."""
    path = folder / "config.json"
    if not path.is_file():
        return None  # `open_model` says what is wrong
    found = read_object(path).get("model_type")
    return found if isinstance(found, str) else None
