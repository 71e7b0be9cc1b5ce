"""Strict loading of a saved model, with errors that say what is wrong with the folder."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

from etr.hf.modeling import EtrForCausalLM


def load_pretrained(folder: str | Path, dtype: torch.dtype | None = None) -> EtrForCausalLM:
    """Load what `EtrForCausalLM.save_pretrained` wrote, in eval mode; nothing is downloaded.

    `from_pretrained` fills in tensors that a checkpoint lacks with random ones and goes on; here
    only routing state may be missing, with a warning.

    Args:
        folder: holds config.json and *.safetensors.
        dtype: of the weights (routing state keeps its own); None for the saved one.
    Raises:
        FileNotFoundError: no such folder, no config.json or no weights in it.
        ValueError: config of another model type, damaged weights, or weights of another config.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds no config.json; give a folder that save_pretrained wrote"
        )
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"folder={str(folder)!r} holds a config.json but no *.safetensors")
    config, _ = EtrForCausalLM.config_class.get_config_dict(folder, local_files_only=True)
    if config.get("model_type") != "etr":
        raise ValueError(
            f"{folder / 'config.json'} has model_type={config.get('model_type')!r}; it must be "
            "'etr'"
        )
    try:
        model, info = EtrForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below with the other differences
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise ValueError(f"weights in {str(folder)!r} are damaged: {error}") from error
    _check_keys(folder, model, info)
    return model


def _check_keys(folder: Path, model: EtrForCausalLM, info: dict[str, set]) -> None:
    problems = {
        "missing": set(info["missing_keys"]) - model.state_keys(),
        "unexpected": set(info["unexpected_keys"]),
        "of another shape": {key for key, *_ in info["mismatched_keys"]},
    }
    found = [f"{len(keys)} {kind} (such as {min(keys)})" for kind, keys in problems.items() if keys]
    if found:
        raise ValueError(
            f"weights in {str(folder)!r} do not belong to its config.json: {', '.join(found)}"
        )
