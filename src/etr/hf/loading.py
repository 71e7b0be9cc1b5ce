"""Strict loading of a saved model, with errors that say what is wrong with the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
)

from etr.hf.config import EtrConfig
from etr.hf.modeling import EtrForCausalLM
from etr.hf.shards import ShardReader
from etr.pretrained import from_local

Info = dict[str, set[Any]]


def load_pretrained(folder: str | Path, dtype: torch.dtype | None = None) -> EtrForCausalLM:
    """Load what `EtrForCausalLM.save_pretrained` wrote, in eval mode; nothing is downloaded.

    `from_pretrained` fills in tensors that a checkpoint lacks with random ones and goes on; here
    only routing state may be missing, with a warning. Weights are read by `ShardReader` and by
    nothing else: no other file of the folder counts, and none of its code runs.

    Args:
        folder: holds config.json and *.safetensors.
        dtype: of the weights (routing state keeps its own); None for the saved one.
    Raises:
        FileNotFoundError: no such folder, no config.json or no weights in it.
        ValueError: config of another model type, damaged weights, or weights of another config.
    """
    return load_strictly(EtrForCausalLM, ShardReader(folder), dtype)


def load_strictly(
    model_class: type[EtrForCausalLM],
    reader: ShardReader,
    dtype: torch.dtype | None = None,
    left: Callable[[str], bool] = lambda key: False,
) -> EtrForCausalLM:
    """`load_pretrained`, as a class whose modules may lack some of a folder's tensors.

    Args:
        left: whether a tensor, by its key, is not read.
    """
    model, info = _read_model(model_class, read_config(reader), reader, dtype, left)
    _refuse(
        reader,
        {
            "missing": set(info["missing_keys"]) - model.state_keys(),
            "unexpected": set(info["unexpected_keys"]),
            "of another shape": {key for key, *_ in info["mismatched_keys"]},
        },
    )
    found: EtrForCausalLM = model
    return found


def load_causal(folder: str | Path, dtype: torch.dtype | None = None) -> Any:
    """Load a causal language model of this library or of transformers, in eval mode.

    As strictly as `load_pretrained`, but for tensors that a model of transformers leaves out.

    Args:
        folder, dtype: see `load_pretrained`.
    Raises:
        FileNotFoundError: no such folder, no config.json or no weights in it.
        ValueError: not a causal language model, damaged weights, or weights of another config.
    """
    reader = ShardReader(folder)
    if reader.config.get("model_type") == EtrConfig.model_type:
        return load_pretrained(folder, dtype)
    model, info = _read_listed(MODEL_FOR_CAUSAL_LM_MAPPING, reader, dtype)
    _refuse(
        reader,
        {
            "missing": set(info["missing_keys"]),
            "of another shape": {key for key, *_ in info["mismatched_keys"]},
        },
    )
    return model


def load_base(folder: str | Path) -> Any:
    """Load a model of transformers without its head, for its hidden states, in eval mode.

    Raises:
        FileNotFoundError: no such folder, no config.json or no weights in it.
        ValueError: no model of transformers, or damaged weights.
    """
    return _read_listed(MODEL_MAPPING, ShardReader(folder), None)[0]


def read_config(reader: ShardReader) -> EtrConfig:
    """Config of a folder of this library.

    Raises:
        ValueError: another model type, or values that make no model.
    """
    path = reader.folder / "config.json"
    try:
        with _values_of(path):
            return EtrConfig.from_json_file(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_listed(classes: Any, reader: ShardReader, dtype: torch.dtype | None) -> tuple[Any, Info]:
    """Build the model that a table of transformers has for a folder's config."""
    with _values_of(reader.folder / "config.json"):
        config = from_local(AutoConfig, reader.folder)
    if type(config) not in classes:
        raise ValueError(
            f"{reader.folder / 'config.json'} has model_type={config.model_type!r}, for which "
            "transformers has no language model"
        )
    return _read_model(classes[type(config)], config, reader, dtype)


def _read_model(
    model_class: Any,
    config: PreTrainedConfig,
    reader: ShardReader,
    dtype: torch.dtype | None,
    left: Callable[[str], bool] = lambda key: False,
) -> tuple[Any, Info]:
    """Build a model around the tensors of a folder, but for those that are left."""
    for part in (config, getattr(config, "base_config", None)):
        attention = getattr(part, "_attn_implementation", None)
        if attention is not None and "/" in attention:
            raise ValueError(
                f"{reader.folder / 'config.json'} has attn_implementation={attention!r}, which is "
                "code from the Hub; remove it"
            )
    options: dict[str, Any] = {}
    if (reader.folder / "generation_config.json").is_file():
        with _values_of(reader.folder / "generation_config.json"):
            options["generation_config"] = GenerationConfig.from_pretrained(
                reader.folder, local_files_only=True
            )
    config.name_or_path = str(reader.folder)
    try:
        with reader.slices() as tensors, _values_of(reader.folder / "config.json"):
            # Without a path: transformers would look for weights of other names and formats too,
            # for adapters, and for code.
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict={key: part for key, part in tensors.items() if not left(key)},
                dtype=dtype or config.dtype or reader.float_dtype(),
                ignore_mismatched_sizes=True,  # reported by the caller with the other differences
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
    except SafetensorError as error:
        raise ValueError(f"weights in {str(reader.folder)!r} are damaged: {error}") from error
    model.name_or_path = model.config.name_or_path = str(reader.folder)
    return model, info


def _refuse(reader: ShardReader, problems: dict[str, set[str]]) -> None:
    found = [f"{len(keys)} {kind} (such as {min(keys)})" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"weights in {str(reader.folder)!r} do not belong to its config.json: "
            f"{', '.join(found)}"
        )


@contextmanager
def _values_of(path: Path) -> Iterator[None]:
    """Name the file whose values end in errors of every kind, since transformers checks few.

    Raises:
        ValueError: in the place of a TypeError, KeyError, ZeroDivisionError and so on.
    """
    try:
        yield
    except (ValueError, OSError, SafetensorError, MemoryError, RecursionError):
        raise
    except torch.OutOfMemoryError:  # of a device
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} makes no model: {type(error).__name__}: {reason}") from error
