"""Model folders read one tensor at a time and written shard by shard.

A folder is transformers' own kind: config.json, and either model.safetensors or several shards with
model.safetensors.index.json.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from etr.model.transform import LazyTensor
from etr.pretrained import check_links

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MARKER = "INCOMPLETE.json"
"""File in a folder that is still being written; it tells what from and how."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
"""Data types of weights and routing state, and what the file format calls them."""
_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}
KEPT_WITH_WEIGHTS = (
    *("config.json", "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.gguf"),
    *("manifest.json", "train_state.json"),  # of a run's checkpoint
    "transform.json",  # of what was made by one
)
"""Files that do not travel with the tokenizer and generation options."""


class ShardReader:
    """Reads single tensors of a model folder; holds no more than it is asked for.

    The one rule about which files hold a model's weights: model.safetensors, or else the shards of
    model.safetensors.index.json, as transformers chooses; files of the folder itself, and never
    another format.

    Args:
        folder: holds config.json and the weights as safetensors.
    Raises:
        FileNotFoundError: no such folder, no config.json, no weights, or a missing shard.
        ValueError: a damaged file, an index that is wrong, or an index or a link that leaves the
            folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"folder={str(folder)!r} is not a folder; give one that holds a model"
            )
        check_links(self.folder)
        if not (self.folder / "config.json").is_file():
            raise FileNotFoundError(
                f"folder={str(folder)!r} holds no config.json; give a folder that save_pretrained "
                "wrote"
            )
        self.config: dict[str, Any] = _read_json(self.folder / "config.json")
        index = weight_map(self.folder)
        self._shard: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, str] = {}
        for shard in [WEIGHTS] if index is None else sorted(set(index.values())):
            self._read_header(shard)
        if index is not None:
            self._check_index(index)
        self._open: tuple[str, Any] | None = None

    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._shard)

    def __contains__(self, key: str) -> bool:
        return key in self._shard

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        self._check_key(key)
        return self._shape[key]

    def dtype(self, key: str) -> torch.dtype:
        """Data type of a tensor, from its file's header.

        Raises:
            ValueError: it is not among `DTYPES`.
        """
        self._check_key(key)
        if self._dtype[key] not in _DTYPE_OF:
            raise ValueError(
                f"{key!r} in {self.folder / self._shard[key]} has dtype {self._dtype[key]}; "
                f"readable are {', '.join(_DTYPE_OF)} (load a quantised model with transformers "
                "and save it dequantised)"
            )
        return _DTYPE_OF[self._dtype[key]]

    def float_dtype(self) -> torch.dtype:
        """Data type of the first tensor with a floating one; float32 where there is none."""
        dtypes = (_DTYPE_OF.get(name) for name in self._dtype.values())
        return next((d for d in dtypes if d and d.is_floating_point), torch.float32)

    def tensor(self, key: str) -> Tensor:
        """Read one tensor into memory of its own."""
        self._check_key(key)
        shard = self._shard[key]
        if self._open is None or self._open[0] != shard:
            self._open = (shard, safe_open(self.folder / shard, framework="pt"))
        return self._open[1].get_tensor(key).clone()  # not a view of the mapped file

    @contextmanager
    def slices(self) -> Iterator[dict[str, Any]]:
        """Every tensor as safetensors' slice of an open file, which reads when it is indexed."""
        with ExitStack() as stack:
            files = {
                shard: stack.enter_context(safe_open(self.folder / shard, framework="pt"))
                for shard in sorted(set(self._shard.values()))
            }
            yield {key: files[shard].get_slice(key) for key, shard in self._shard.items()}

    def lazy(self, key: str) -> LazyTensor:
        """A tensor to be written as it stands here."""
        return LazyTensor(
            name=key, shape=self.shape(key), dtype=self.dtype(key), make=lambda: self.tensor(key)
        )

    def fingerprint(self) -> dict[str, Any]:
        """What changes when the folder's contents do: size and time of each file."""
        files = [self.folder / name for name in ("config.json", *sorted(set(self._shard.values())))]
        return {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}

    def _read_header(self, shard: str) -> None:
        try:
            with safe_open(self.folder / shard, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  it is no dict
                    part = file.get_slice(key)
                    if key in self._shard:
                        raise ValueError(f"{key!r} stands in {self._shard[key]} and in {shard}")
                    self._shard[key] = shard
                    self._shape[key] = tuple(part.get_shape())
                    self._dtype[key] = part.get_dtype()
        except SafetensorError as error:
            raise ValueError(f"{self.folder / shard} is damaged: {error}") from error

    def _check_index(self, index: Mapping[str, str]) -> None:
        wrong = [key for key in {*index, *self._shard} if index.get(key) != self._shard.get(key)]
        if wrong:
            key = min(wrong)
            raise ValueError(
                f"{self.folder / INDEX} is wrong about {len(wrong)} tensors: it places {key!r} in "
                f"{index.get(key)}, and it stands in {self._shard.get(key)}"
            )

    def _check_key(self, key: str) -> None:
        if key not in self._shard:
            raise ValueError(f"folder={str(self.folder)!r} has no tensor {key!r}")


def weight_map(folder: Path) -> dict[str, str] | None:
    """The shard of each tensor as a folder's index has it; None where one file holds them all.

    Raises:
        FileNotFoundError: no weights as safetensors, or a missing shard.
        ValueError: a damaged index, or one that names a file outside of the folder.
    """
    path = folder / INDEX
    if (folder / WEIGHTS).is_file():  # an index beside it is not read: transformers does not
        return None
    if not path.is_file():
        other = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"; load {other[0]} with transformers and save it again" if other else ""
        raise FileNotFoundError(
            f"folder={str(folder)!r} holds neither {WEIGHTS} nor {INDEX}; only safetensors are "
            f"read{hint}"
        )
    index = _read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{path} has no weight_map of tensor names and shard files")
    for key, shard in index.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise ValueError(
                f"{path} places {key!r} in {shard!r}, which is not the name of a file in its folder"
            )
        if not (folder / shard).is_file():
            raise FileNotFoundError(
                f"shard {shard} of {str(folder)!r} is missing: {path.name} places {key!r} there; "
                "copy the folder again"
            )
    return index


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
            if _read_json(marker) != wanted:
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return values


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
