"""Model folders written shard by shard, complete or marked as not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from etr.files import read_object
from etr.hf.shards import DTYPES, INDEX, WEIGHTS, LazyTensor
from etr.pretrained import check_links

MARKER = "INCOMPLETE.json"
"""File in a folder that is still being written; it tells what from and how."""
KEPT_WITH_WEIGHTS = (
    *("config.json", "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.gguf"),
    *("manifest.json", "train_state.json"),  # of a run's checkpoint
    "transform.json",  # of what was made by one
)
"""Files that do not travel with the tokenizer and generation options."""


class ShardWriter:
    """Writes a model folder, complete or marked as not.

    Everything goes into ``NAME.partial`` beside the target, which `finish` renames. A second run
    with the same recipe goes on where the first one stopped.

    Args:
        target: folder to write; must not exist, or be empty.
        recipe: JSON-ready values that decide the contents; a partial folder of another recipe is
            thrown away.
        max_shard_bytes: size from which a new shard begins.
    Raises:
        ValueError: the target is there already, or the partial folder is not this class's.
    """

    def __init__(
        self, target: str | Path, recipe: Mapping[str, Any], max_shard_bytes: int = 4 * 10**9
    ) -> None:
        self.target = Path(target)
        self.max_shard_bytes = max_shard_bytes
        self.partial = self.target.with_name(f"{self.target.name}.partial")
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
        if self.target.exists() and (self.target.is_file() or any(self.target.iterdir())):
            raise ValueError(f"{str(target)!r} exists already; name a new folder")
        marker = self.partial / MARKER
        wanted = json.loads(json.dumps({**recipe, "max_shard_bytes": max_shard_bytes}))
        if self.partial.exists():
            if not marker.is_file():
                raise ValueError(f"{str(self.partial)!r} is in the way; remove it")
            if read_object(marker) != wanted:
                shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        marker.write_text(json.dumps(wanted, indent=1), encoding="utf-8")

    def write(
        self, tensors: Sequence[LazyTensor], progress: Callable[[int], None] = lambda size: None
    ) -> None:
        """Write all weights, one tensor in memory at a time; shards that are there are left.

        Args:
            tensors: every tensor of the folder, always in the same order.
            progress: called with the bytes of each tensor done.
        """
        shards = _split(tensors, self.max_shard_bytes)
        names = [_shard_name(i, len(shards)) for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            if (self.partial / name).is_file():
                progress(sum(tensor.num_bytes for tensor in shard))
            else:
                _write_shard(self.partial / name, shard, progress)
        if len(shards) > 1:
            pairs = zip(names, shards, strict=True)
            index = {
                "metadata": {"total_size": sum(tensor.num_bytes for tensor in tensors)},
                "weight_map": {t.name: name for name, shard in pairs for t in shard},
            }
            (self.partial / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def copy_beside(self, source: str | Path) -> None:
        """Copy tokenizer, generation options and the like from another model folder.

        Raises:
            ValueError: one of its files is a link that leaves it.
        """
        check_links(Path(source))
        for file in sorted(Path(source).iterdir()):
            if file.is_file() and not any(map(file.match, (*KEPT_WITH_WEIGHTS, ".*"))):
                shutil.copyfile(file, self.partial / file.name)

    def finish(
        self, config: Mapping[str, Any], check: Callable[[Path], None] = lambda folder: None
    ) -> Path:
        """Write config.json, take the mark off, and give the folder its name.

        Args:
            config: of the folder.
            check: called with the folder before it has its name; when it raises ValueError,
                nothing is left.
        """
        text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
        (self.partial / "config.json").write_text(text, encoding="utf-8")
        try:
            check(self.partial)
        except ValueError:
            shutil.rmtree(self.partial)
            raise
        (self.partial / MARKER).unlink()
        if self.target.exists():
            self.target.rmdir()
        os.replace(self.partial, self.target)
        return self.target


def _split(tensors: Iterable[LazyTensor], max_bytes: int) -> list[list[LazyTensor]]:
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _shard_name(number: int, count: int) -> str:
    return WEIGHTS if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_shard(
    path: Path, tensors: Sequence[LazyTensor], progress: Callable[[int], None]
) -> None:
    """A safetensors file, its tensors made and written one after another.

    The format is the header's length, a JSON header of types, shapes and places, and the bytes.
    Saving through the library would hold the whole shard in memory.
    """
    # Wide types first, so that every tensor is aligned.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            value = tensor.make()
            if tuple(value.shape) != tensor.shape or value.dtype != tensor.dtype:
                raise ValueError(
                    f"{tensor.name!r} came out as {value.dtype} {tuple(value.shape)}; it must be "
                    f"{tensor.dtype} {tensor.shape}"
                )
            file.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
            progress(tensor.num_bytes)
            del value
    os.replace(temporary, path)
