"""Runs a `Transform` over a model folder: measure, plan, and write tensor after tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etr.files import read_json, sha256_of_file, write_json
from etr.hf.config import EtrConfig
from etr.hf.convert import (
    Direction,
    LogitsComparison,
    TransformReport,
    check_same_function,
    family_config,
    folder_config,
    ignored_keys,
    write_tensors,
)
from etr.hf.layer_options import OF_LAYERS, stored_options
from etr.hf.loading import read_config
from etr.hf.matching import of_ours, skeleton, to_ours, to_theirs
from etr.hf.modeling import EtrForCausalLM
from etr.hf.shard_writer import ShardWriter
from etr.hf.shards import ShardReader
from etr.model.transform import LazyTensor, Stats, Transform, summed
from etr.moe import MoE, MoEConfig
from etr.moe.config import SIZES
from etr.moe.watch import LayerView, watch
from etr.table import config_to_dict

RECORD = "transform.json"
"""File in the new folder: the transform, its plan, and the checksums of the weights."""
Batches = Iterable[Mapping[str, Tensor]]
"""Text as arguments of the model's forward."""


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
        _check_record(reader.folder)
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


def transform(
    source: str | Path,
    target: str | Path,
    method: Transform,
    *,
    plan: Any = None,
    batches: Batches = (),
    max_shard_bytes: int = 4 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
    compare: bool = False,
) -> TransformReport:
    """Write what a method makes of a folder, as a folder of the same format.

    Memory holds one tensor at a time, and the whole model only while a method measures or models
    are compared. An interrupted run goes on where it stopped; until it is complete the folder is
    called ``TARGET.partial``. The source is never written to.

    Args:
        source: folder of this library, or of a known family of transformers.
        target: new folder.
        method: what to do.
        plan: what the method shall do, as it was written before (and changed by a person, perhaps);
            None lets the method plan.
        batches: text for a method that measures; on the model's device.
        max_shard_bytes: size from which a new file of weights begins.
        progress: called with bytes done and bytes in all.
        compare: run both models on a few tokens, one after the other, before the new folder gets
            its name; they must agree where the method says so.
    Raises:
        FileNotFoundError: no such folder, no config.json, or a missing shard.
        ValueError: an unknown family; unknown, missing or misshapen tensors; a plan for other
            layers; no text to measure on; layers that the format cannot hold; a target that exists.
    """
    opened = Source.open(source)
    plan = _planned(opened, method, plan, batches)
    config, tensors = _made(opened, method, plan)
    values = {"transform": config_to_dict(method), "plan": plan}
    recipe = {**values, "source": opened.reader.fingerprint()}
    writer = ShardWriter(target, recipe, max_shard_bytes)
    write_tensors(writer, tensors, progress)
    writer.copy_beside(source)
    _write_record(writer.partial, values)
    reason = method.changes_function()
    comparison = LogitsComparison(source, demand=reason is None)
    to: Direction = "etr" if opened.ours else "hf"
    new = folder_config(config, to, opened.reader.config)
    writer.finish(new, comparison if compare else lambda folder: None)
    return TransformReport(
        target=Path(target),
        family=config.family.model_type,
        to=to,
        num_tensors=len(tensors),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        same_function=reason is None,
        reason=reason or "",
        ignored=opened.ignored,
        difference=comparison.found,
    )


def _planned(opened: Source, method: Transform, plan: Any, batches: Batches) -> Any:
    """The plan, checked; the method's own where none is given."""
    layers = opened.layers()
    if plan is None:
        stats: list[Stats] = [{} for _ in layers]
        if method.measures:
            stats = measure(opened.load(), method, batches)
        plan = method.plan(stats, list(layers.values()))
    method.check(plan, list(layers.values()))
    return plan


def _made(opened: Source, method: Transform, plan: Any) -> tuple[EtrConfig, list[LazyTensor]]:
    """Config and tensors of the new folder."""
    layers, tensors = opened.layers(), dict(opened.tensors)
    new = [method.options(layer, plan, i) for i, layer in enumerate(layers.values())]
    config = changed_config(opened.config, list(layers.values()), new)
    for place, prefix in enumerate(layers):
        tensors = _applied(method, tensors, prefix, plan, place)
    return config, _in_format_of(opened, config, tensors, method)


@torch.no_grad()
def measure(model: EtrForCausalLM, method: Transform, batches: Batches) -> list[Stats]:
    """What a method observes of each MoE layer, summed over text.

    Args:
        model: in the mode in which it is to be measured.
        method: one that measures.
        batches: on the model's device.
    Raises:
        ValueError: there is no text.
    """
    found: list[Stats] = [{} for module in model.modules() if isinstance(module, MoE)]

    def see(place: int, view: LayerView) -> None:
        found[place] = summed(found[place], method.observe(view))

    with watch(model, see, method.needs):
        for batch in batches:
            model(**batch)
    if not any(found):
        raise ValueError(f"transform {method.name!r} measures on text, and there is none")
    return found


def changed_config(
    config: EtrConfig, old: Sequence[MoEConfig], new: Sequence[MoEConfig]
) -> EtrConfig:
    """The model's config with other layers, of which each may have options of its own.

    Raises:
        ValueError: layers would differ in hidden_size.
    """
    if list(new) == list(old):
        return config
    base, family, values = copy.deepcopy(config.base_config), config.family, new[0].to_dict()
    if len({layer.hidden_size for layer in new}) > 1:
        raise ValueError("layers would differ in hidden_size, which a model has once")
    moe: Any = [stored_options(layer, OF_LAYERS) for layer in new]
    if all(layer.to_dict() == values for layer in new):
        moe = stored_options(new[0], ())
        for name in SIZES:
            setattr(base, getattr(family, name, name), values[name])
    return EtrConfig(base_config=base, moe=moe, aux_coefficient=config.aux_coefficient)


def _applied(
    method: Transform, tensors: dict[str, LazyTensor], prefix: str, plan: Any, place: int
) -> dict[str, LazyTensor]:
    """All tensors, with those of one layer changed."""
    inside = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    changed = {
        prefix + name: LazyTensor(
            name=prefix + name, shape=tensor.shape, dtype=tensor.dtype, make=tensor.make
        )
        for name, tensor in method.apply(inside, plan, place).items()
    }
    return {**{k: t for k, t in tensors.items() if not k.startswith(prefix)}, **changed}


def _in_format_of(
    opened: Source, config: EtrConfig, tensors: dict[str, LazyTensor], method: Transform
) -> list[LazyTensor]:
    """The tensors of the new folder, which its config must ask for.

    Raises:
        ValueError: they are not those of the config, or the family cannot hold them.
    """
    model = opened.model if config is opened.config else skeleton(config)
    made = _Made(opened.reader.folder, tensors)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys or ())
    wrong = [
        f"{name} is {made.shape(name) if name in made else 'missing'}, not {wanted.get(name)}"
        for name in sorted({*wanted, *tensors})
        if (name in made or name not in tied)
        and (name not in made or made.shape(name) != wanted.get(name))
    ]
    if wrong:
        raise ValueError(
            f"transform {method.name!r} makes {len(wrong)} tensors that its config does not ask "
            f"for: {'; '.join(wrong[:3])}"
        )
    if opened.ours:
        return list(tensors.values())
    check_same_function(config)
    return to_theirs(made, model)


class _Made(ShardReader):
    """A reader of a folder whose tensors are made, not read."""

    def __init__(self, folder: Path, tensors: Mapping[str, LazyTensor]) -> None:
        self.folder, self._tensors = folder, tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def tensor(self, key: str) -> Tensor:
        return self._tensors[key].make()


def _write_record(folder: Path, values: Mapping[str, Any]) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    write_json(folder / RECORD, {**values, "sha256": {f.name: sha256_of_file(f) for f in weights}})


def _check_record(folder: Path) -> None:
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
