"""Runs a `Transform` over a model folder: measure, plan, and write tensor after tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etr.files import write_json
from etr.hf.config import EtrConfig
from etr.hf.convert import (
    Direction,
    LogitsComparison,
    TransformReport,
    check_same_function,
    folder_config,
    write_tensors,
)
from etr.hf.layer_options import OF_LAYERS, stored_options
from etr.hf.matching import initial_state, skeleton, to_theirs
from etr.hf.measure import NORM_BEFORE, Batches, measure
from etr.hf.modeling import EtrForCausalLM
from etr.hf.shard_writer import ShardWriter
from etr.hf.shards import ShardReader
from etr.hf.source import RECORD, Source, checksums
from etr.model.transform import LazyTensor, Stats, Transform
from etr.moe import MoEConfig, moe_layers
from etr.moe.config import SIZES
from etr.table import config_to_dict

NORM = "norm.weight"
"""What a transform calls the norm before the layer."""


def transform(
    source: str | Path,
    target: str | Path,
    method: Transform,
    *,
    plan: Any = None,
    made_for: Mapping[str, Any] | None = None,
    batches: Batches = (),
    max_shard_bytes: int = 4 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
    compare: bool = False,
) -> TransformReport:
    """Write what a method makes of a folder, as a folder of the same format where that can hold it.

    What a family of transformers cannot hold is written in this library's format. Memory holds one
    layer's experts at a time, and the whole model only while a method measures or models are
    compared. An interrupted run goes on where it stopped; until it is complete the folder is called
    ``TARGET.partial``. The source is never written to.

    Args:
        source: folder of this library, or of a known family of transformers.
        target: new folder.
        method: what to do.
        plan: what the method shall do, as it was written before (and changed by a person, perhaps);
            None lets the method plan.
        made_for: checksums of the weights that `plan` was made for, as `plan_of` writes them; None:
            it may be for any.
        batches: text for a method that measures; on the model's device.
        max_shard_bytes: size from which a new file of weights begins.
        progress: called with bytes done and bytes in all.
        compare: run both models on a few tokens, one after the other, before the new folder gets
            its name; they must agree where the method says so.
    Raises:
        FileNotFoundError: no such folder, no config.json, or a missing shard.
        ValueError: an unknown family, wrong tensors, a plan for other layers or weights, no text to
            measure on, or a target that exists.
    """
    opened = Source.open(source)
    plan = _planned(opened, method, plan, batches, made_for)
    config, tensors, why_ours = _made(opened, method, plan)
    record = _record(opened, method, plan)
    recipe = {**record, "source": opened.reader.fingerprint()}
    writer = ShardWriter(target, recipe, max_shard_bytes)
    write_tensors(writer, tensors, progress)
    writer.copy_beside(source)
    write_json(writer.partial / RECORD, {**record, "sha256": checksums(writer.partial)})
    to: Direction = "etr" if opened.ours or why_ours else "hf"
    comparison = LogitsComparison(source, demand=method.changes_function() is None)
    new = folder_config(config, to, opened.reader.config)
    writer.finish(new, comparison if compare else lambda folder: None)
    report = _report(opened, method, plan, tensors, to)
    return replace(
        report,
        target=Path(target),
        why_ours=why_ours,
        difference=comparison.found,
        flops=flops_of_a_token(skeleton(config)),
    )


def _report(
    opened: Source, method: Transform, plan: Any, tensors: list[LazyTensor], to: Direction
) -> TransformReport:
    """What is made of a folder, but for where."""
    reason = method.changes_function()
    return TransformReport(
        target=opened.reader.folder,
        family=opened.config.family.model_type,
        to=to,
        num_tensors=len(tensors),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        source_bytes=opened.num_bytes(with_state=to == "etr"),
        source_flops=flops_of_a_token(opened.model),
        plan=method.describe(plan, list(opened.layers().values())),
        same_function=reason is None,
        reason=reason or "",
        ignored=opened.ignored,
    )


def flops_of_a_token(model: EtrForCausalLM) -> float:
    """Floating-point operations of all experts for a token that takes its `top_k` largest ones.

    Shared experts count too; a multiply-add is two.
    """
    total = 0.0
    for layer in moe_layers(model):
        sizes = torch.tensor(layer.bank.sizes)
        largest = sizes.argsort(descending=True)[: layer.config.top_k]
        total += float(layer.bank.flops(torch.zeros_like(sizes).index_fill(0, largest, 1.0)))
        total += layer.bank.flops_of_any_token
        if layer.shared_experts is not None:
            total += 2 * sum(value.numel() for value in layer.shared_experts.parameters())
    return total


def plan_of(source: str | Path, method: Transform, *, batches: Batches = ()) -> dict[str, Any]:
    """What a method would do to a folder: its record without the weights, to be read and changed.

    Args:
        source, method, batches: as in `transform`.
    Returns:
        The transform, its plan, and what the plan is made for where the method measures, as values
        of JSON.
    Raises:
        FileNotFoundError, ValueError: see `transform`.
    """
    opened = Source.open(source)
    return _record(opened, method, _planned(opened, method, None, batches))


def _record(opened: Source, method: Transform, plan: Any) -> dict[str, Any]:
    """A transform, its plan, and the weights that it is for, where the method looked at them."""
    found = {"transform": config_to_dict(method), "plan": plan}
    if method.measures or method.inspects:
        found["made_for"] = checksums(opened.reader.folder)
    return found


def _planned(
    opened: Source,
    method: Transform,
    plan: Any,
    batches: Batches,
    made_for: Mapping[str, Any] | None = None,
) -> Any:
    """The plan, checked; the method's own where none is given."""
    layers = opened.layers()
    if made_for is not None and dict(made_for) != checksums(opened.reader.folder):
        raise ValueError(
            f"the plan was made for another checkpoint than {str(opened.reader.folder)!r}: "
            "checksums of the weights differ; plan anew"
        )
    if plan is None:
        stats: list[Stats] = [{} for _ in layers]
        if method.measures or method.inspects:
            stats = measure(opened.load(), method, batches)
        plan = method.plan(stats, list(layers.values()))
    method.check(plan, list(layers.values()))
    return plan


def _made(opened: Source, method: Transform, plan: Any) -> tuple[EtrConfig, list[LazyTensor], str]:
    """Config and tensors of the new folder, and why it is of our format where its source is not."""
    layers, tensors = opened.layers(), dict(opened.tensors)
    new = [method.options(layer, plan, i) for i, layer in enumerate(layers.values())]
    config = changed_config(opened.config, list(layers.values()), new)
    for place, prefix in enumerate(layers):
        tensors = _applied(method, tensors, prefix, plan, place)
    model = opened.model if config is opened.config else skeleton(config)
    tensors |= {tensor.name: tensor for tensor in initial_state(model, set(tensors))}
    made = _checked(opened, tensors, model, method)
    why_ours = ""
    if not opened.ours:
        try:
            check_same_function(config)
            return config, to_theirs(made, model), ""
        except ValueError as error:
            why_ours = str(error)
    return config, list(tensors.values()), why_ours


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
    """All tensors, with those of one layer changed, side by side where its first one stood.

    What is made together is so written together, and memory holds what one layer makes.
    """
    inside = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    if method.takes_norm:  # of the decoder layer that holds the block
        inside[NORM] = f"{prefix.removesuffix('.').rpartition('.')[0]}.{NORM_BEFORE}.weight"
    given = {short: tensors[name] for short, name in inside.items()}
    changed = {
        inside.get(short, prefix + short): tensor
        for short, tensor in method.apply(given, plan, place).items()
    }
    found: dict[str, LazyTensor] = {}
    old, first = set(inside.values()), True
    for name, tensor in tensors.items():
        if name not in old:
            found[name] = tensor
        elif first:
            found |= {new: replace(each, name=new) for new, each in changed.items()}
            first = False
    return found


def _checked(
    opened: Source, tensors: dict[str, LazyTensor], model: EtrForCausalLM, method: Transform
) -> _Made:
    """The tensors of the new folder, which its config must ask for.

    Raises:
        ValueError: they are not those of the config.
    """
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
    return made


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
