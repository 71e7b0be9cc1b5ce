"""Opening a trained model from a checkpoint or a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from etr.data import load_tokenizer
from etr.hf import EtrForCausalLM, load_pretrained
from etr.train.checkpoint import list_checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_model(path: str) -> tuple[EtrForCausalLM, PreTrainedTokenizerBase, Path]:
    """Model in eval mode, its tokenizer, and the folder they came from.

    Args:
        path: a checkpoint, or a run's folder, whose newest checkpoint is taken.
    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder holds no model of this library.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is no folder; give a checkpoint or a run's folder")
    checkpoints = list_checkpoints(folder)
    if checkpoints:
        folder = checkpoints[-1]
    return load_pretrained(folder), load_tokenizer(folder), folder
