"""Which tensors of a family's checkpoint make up which tensor of ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from etr.hf.config import EtrConfig
from etr.hf.layouts import LAYOUTS, Layout
from etr.hf.modeling import EtrForCausalLM
from etr.hf.shards import DTYPES, LazyTensor, ShardReader, unreadable
from etr.moe.state import GlobalState


@dataclass(frozen=True, kw_only=True)
class Match:
    """One tensor of ours and those of the family that hold the same numbers."""

    ours: str
    """Key in our folder."""
    theirs: tuple[str, ...]
    """Keys on disk, in the order of the layout."""
    layout: Layout
    """How they become ours and back."""
    parts: int
    """How many parts they are of, see `Layout`."""
    shape: tuple[int, ...]
    """Shape of ours."""
    their_shapes: tuple[tuple[int, ...], ...]
    """Shapes of theirs."""
    fused: str | None = None
    """Key of one tensor of our shape that may stand for all of theirs."""


def skeleton(config: EtrConfig) -> EtrForCausalLM:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return EtrForCausalLM(config)


def match_keys(model: EtrForCausalLM) -> list[Match]:
    """A match for every weight of `model`, and for state that the family has too."""
    family = model.config.family
    named: dict[str, Match] = {}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    num_experts = model.config.moe_config.num_experts
    for number, layer in enumerate(model.model.layers):
        if not family.is_moe(layer):
            continue
        prefix = f"model.layers.{number}."
        for key in family.keys:
            ours = f"{prefix}{family.block}.{key.ours}"
            if ours not in shapes:  # a router or an option that the family does not have
                continue
            layout = LAYOUTS[key.layout]
            pieces = layout.split(torch.empty(shapes[ours], device="meta"), len(key.theirs))
            named[ours] = Match(
                ours=ours,
                theirs=tuple(f"{prefix}{name}" for name in _numbered(key.theirs, num_experts)),
                layout=layout,
                parts=len(key.theirs),
                shape=shapes[ours],
                their_shapes=tuple(tuple(piece.shape) for piece in pieces),
                fused=None if key.fused is None else prefix + key.fused,
            )
    state = model.state_keys()
    return [
        named[name] if name in named else _same(name, shape)
        for name, shape in shapes.items()
        if name in named or name not in state
    ]


def of_ours(reader: ShardReader, model: EtrForCausalLM) -> list[LazyTensor]:
    """Every tensor of a folder of this library, as it stands there.

    Args:
        reader: our folder.
        model: what its config makes.
    Raises:
        ValueError: tensors are unknown or missing, or differ in shape.
    """
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    optional = _tied(model) | model.state_keys()
    present = [name for name in shapes if name in reader]
    missing = [name for name in shapes if name not in reader and name not in optional]
    _check_complete(reader, missing, set(reader.keys()) - set(shapes))
    _check_shapes(reader, present, [shapes[name] for name in present])
    return [*map(reader.lazy, present), *initial_state(model, set(present))]


def to_ours(reader: ShardReader, model: EtrForCausalLM, ignored: Iterable[str]) -> list[LazyTensor]:
    """Every tensor of our folder, from one of the family's.

    Args:
        reader: the family's folder.
        model: what the folder becomes.
        ignored: keys of the folder that do not count.
    Raises:
        ValueError: tensors are unknown or missing, or differ in shape or data type.
    """
    found, used = [], set(ignored)
    missing: list[str] = []
    for match in match_keys(model):
        names: tuple[str, ...] = match.theirs
        shapes, layout = match.their_shapes, match.layout
        if match.fused is not None and match.fused in reader and names[0] not in reader:
            names, shapes, layout = (match.fused,), (match.shape,), LAYOUTS["same"]
        lacking = [name for name in names if name not in reader]
        if lacking:
            missing += [] if match.ours in _tied(model) else lacking
            continue
        used.update(names)
        _check_shapes(reader, names, shapes)
        found.append(
            LazyTensor(
                name=match.ours,
                shape=match.shape,
                dtype=_common_dtype(reader, names),
                make=partial(_join, reader, names, layout, match.parts),
            )
        )
    _check_complete(reader, missing, set(reader.keys()) - used)
    return found + initial_state(model, {tensor.name for tensor in found})


def to_theirs(reader: ShardReader, model: EtrForCausalLM) -> list[LazyTensor]:
    """Every tensor of a family's folder, from one of ours; routing state stays behind.

    Raises:
        ValueError: tensors are unknown or missing, or differ in shape.
    """
    found, used = [], model.state_keys()
    missing: list[str] = []
    last = _Last(reader)
    for match in match_keys(model):
        if match.ours not in reader:
            missing += [] if match.ours in _tied(model) else [match.ours]
            continue
        used.add(match.ours)
        _check_shapes(reader, (match.ours,), (match.shape,))
        for number, name in enumerate(match.theirs):
            found.append(
                LazyTensor(
                    name=name,
                    shape=match.their_shapes[number],
                    dtype=reader.dtype(match.ours),
                    make=partial(last.piece, match, number),
                )
            )
    _check_complete(reader, missing, set(reader.keys()) - used)
    return found


class _Last:
    """The pieces of the tensor that was asked for last, so that it is read once."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._held: tuple[str, list[Tensor]] | None = None

    def piece(self, match: Match, number: int) -> Tensor:
        if self._held is None or self._held[0] != match.ours:
            self._held = None  # before the next is read
            tensor = self._reader.tensor(match.ours)
            self._held = (match.ours, match.layout.split(tensor, match.parts))
        return self._held[1][number]


def _join(reader: ShardReader, names: Sequence[str], layout: Layout, parts: int) -> Tensor:
    return layout.join([reader.tensor(name) for name in names], parts)


def _numbered(patterns: Sequence[str], num_experts: int) -> list[str]:
    """Part after part, and expert after expert where a part has one tensor for each."""
    return [
        name
        for pattern in patterns
        for name in (
            [pattern.replace("*", str(expert)) for expert in range(num_experts)]
            if "*" in pattern
            else [pattern]
        )
    ]


def _same(name: str, shape: tuple[int, ...]) -> Match:
    return Match(
        ours=name,
        theirs=(name,),
        layout=LAYOUTS["same"],
        parts=1,
        shape=shape,
        their_shapes=(shape,),
    )


def _tied(model: EtrForCausalLM) -> set[str]:
    """Keys that a folder may lack, since another holds the same weight."""
    return set(model.all_tied_weights_keys or ())


def initial_state(model: EtrForCausalLM, present: set[str]) -> list[LazyTensor]:
    """Routing state that the family's folder cannot know."""
    found = []
    for prefix, module in model.named_modules():
        if not isinstance(module, GlobalState):
            continue
        for name, value in module.initial_state().items():
            key = f"{prefix}.{name}"
            if key not in present:
                shape = tuple(value.shape)
                found.append(LazyTensor(name=key, shape=shape, dtype=value.dtype, make=value.clone))
    return found


def _common_dtype(reader: ShardReader, names: Sequence[str]) -> torch.dtype:
    dtypes = {reader.dtype(name): name for name in names}
    for dtype, name in dtypes.items():
        if not dtype.is_floating_point:  # packed by other rules than this library's
            raise unreadable(name, reader.folder, DTYPES[dtype])
    if len(dtypes) > 1:
        listed = ", ".join(f"{name!r} is {dtype}" for dtype, name in dtypes.items())
        raise ValueError(
            f"tensors that belong together differ in dtype: {listed}; save the model in one dtype"
        )
    return next(iter(dtypes))


def _check_shapes(
    reader: ShardReader, names: Sequence[str], shapes: Sequence[tuple[int, ...]]
) -> None:
    for name, shape in zip(names, shapes, strict=True):
        if reader.shape(name) != shape:
            raise ValueError(
                f"{name!r} in {str(reader.folder)!r} has shape {reader.shape(name)}; its "
                f"config.json asks for {shape}"
            )


def _check_complete(reader: ShardReader, missing: Sequence[str], unknown: set[str]) -> None:
    problems = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (("unknown tensors", unknown), ("missing tensors", missing))
        if names
    ]
    if problems:
        raise ValueError(f"{str(reader.folder)!r} holds {'; '.join(problems)}")
