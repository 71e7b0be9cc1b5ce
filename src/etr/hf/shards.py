"""Model folders, read one tensor at a time.

A folder is transformers' own kind: config.json, and either model.safetensors or several shards with
model.safetensors.index.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from etr.files import read_object
from etr.model.transform import LazyTensor
from etr.pretrained import check_links

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
"""Data types of weights and routing state, and what the file format calls them."""
_DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}


def unreadable(key: str, where: Path, dtype: str) -> ValueError:
    """The error of a tensor whose numbers cannot be taken for weights."""
    return ValueError(
        f"{key!r} in {where} has dtype {dtype}; readable are {', '.join(_DTYPE_OF)} (load a "
        "quantised model with transformers and save it dequantised)"
    )


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
        self.config: dict[str, Any] = read_object(self.folder / "config.json")
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
            raise unreadable(key, self.folder / self._shard[key], self._dtype[key])
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

    def file(self, key: str) -> Path:
        """The file that holds a tensor."""
        self._check_key(key)
        return self.folder / self._shard[key]

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
                for key in file.keys():  # noqa: SIM118  it is not a dict
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
    index = read_object(path).get("weight_map")
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
