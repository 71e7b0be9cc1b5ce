"""A model folder that is to be transformed: as one of this library, whoever's it is."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etr.files import read_json, sha256_of_file
from etr.hf.config import EtrConfig
from etr.hf.convert import family_config, ignored_keys
from etr.hf.dense import DENSE
from etr.hf.loading import read_config
from etr.hf.matching import of_ours, skeleton, to_ours
from etr.hf.modeling import EtrForCausalLM
from etr.hf.shards import ShardReader
from etr.hf.upcycle import UpcycleConfig, upcycled_config, upcycled_tensors
from etr.model.transform import LazyTensor
from etr.moe import MoE, MoEConfig

RECORD = "transform.json"
"""File in the new folder: the transform, its plan, and the checksums of the weights."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder as one of this library, whoever's it is."""

    reader: ShardReader
    """The folder."""
    ours: bool
    """Whether it is in this library's format."""
    config: EtrConfig
    """Config of the model, or of one that routes as the family does."""
    model: EtrForCausalLM
    """The same on the meta device."""
    tensors: dict[str, LazyTensor]
    """Tensors of the whole model under our names, by name."""
    ignored: tuple[str, ...]
    """Keys of the folder that do not count."""

    @classmethod
    def open(cls, folder: str | Path) -> Source:
        """Read the headers of a folder.

        Raises:
            FileNotFoundError, ValueError: see `transform`.
        """
        reader = ShardReader(folder)
        check_record(reader.folder)
        if reader.config.get("model_type") in DENSE:
            return cls._of_dense(reader)
        ours = reader.config.get("model_type") == "etr"
        config = read_config(reader) if ours else family_config(reader)
        model = skeleton(config)
        ignored = () if ours else ignored_keys(config, reader.keys())
        tensors = of_ours(reader, model) if ours else to_ours(reader, model, ignored)
        return cls(
            reader=reader,
            ours=ours,
            config=config,
            model=model,
            tensors={tensor.name: tensor for tensor in tensors},
            ignored=ignored,
        )

    @classmethod
    def _of_dense(cls, reader: ShardReader) -> Source:
        """A dense model: one of this library with a single expert in each layer."""
        one = UpcycleConfig(num_experts=1, top_k=1, router="token_choice", capacity="none")
        config = upcycled_config(reader, one)
        model = skeleton(config)
        tensors = {tensor.name: tensor for tensor in upcycled_tensors(reader, model, one)}
        return cls(
            reader=reader, ours=True, config=config, model=model, tensors=tensors, ignored=()
        )

    def layers(self) -> dict[str, MoEConfig]:
        """Config of each MoE layer, by the beginning of its tensors' names."""
        found = {
            f"{name}.": module.config
            for name, module in self.model.named_modules()
            if isinstance(module, MoE)
        }
        if not found:
            raise ValueError(f"{str(self.reader.folder)!r} has no MoE layer to transform")
        return found

    def num_bytes(self, with_state: bool) -> int:
        """Bytes of the weights, and of the routing state, which families do not have."""
        state = set() if with_state else self.model.state_keys()
        return sum(t.num_bytes for name, t in self.tensors.items() if name not in state)

    def load(self) -> EtrForCausalLM:
        """The model, to run text through it; in memory as a whole."""
        model: Any = EtrForCausalLM.from_pretrained(
            None,
            config=copy.deepcopy(self.config),
            state_dict={name: tensor.make() for name, tensor in self.tensors.items()},
            dtype=self.reader.float_dtype(),
        )
        found: EtrForCausalLM = model.eval()
        return found


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights, by name."""
    return {file.name: sha256_of_file(file) for file in sorted(folder.glob("*.safetensors"))}


def check_record(folder: Path) -> None:
    """Refuse a folder that was made by a transform, and whose weights have changed since.

    Raises:
        ValueError: names the file.
    """
    path = folder / RECORD
    if not path.is_file():
        return
    record = read_json(path)
    listed = record.get("sha256") if isinstance(record, dict) else None
    for name, wanted in listed.items() if isinstance(listed, dict) else ():
        file = folder / Path(name).name
        if not file.is_file() or sha256_of_file(file) != wanted:
            raise ValueError(
                f"{file} is not what {RECORD} beside it says: it was damaged or replaced; make the "
                "folder again"
            )
