"""The routing-trace file: one Parquet row per token and MoE layer.

    sequence    int32          number of the text row the token stands in, from 0
    position    int32          place among the row's real tokens, from 0
    token_id    int32          vocabulary id
    text        dictionary     the token as text; null where no tokenizer was given
    domain      dictionary     name of the domain the text is of
    layer       int16          number of the MoE layer, from 0 (dense layers do not count, each
                               inner step of a layer does)
    experts     list<int16>    chosen experts, best first where tokens choose
    weights     list<float>    weight of each expert's output in the token's sum; 0 if dropped
    affinities  list<float>    what ranked each choice; null where the router has no scores
    kept        list<bool>     False where the expert dropped the token
    block       int32          number of the block the position is in, from 0
    step        int32          number of the step in its block, from 0; -1 where tokens go into the
                               cache

Only traces of models that fill blocks have the last two, and `step` only those that were recorded
while one wrote: there a pass of the model is a run of rows with one step, and within a layer passes
follow each other in time. A pass with step -1 puts blocks into the cache: those of the prompt, or
one that is finished.

The four lists of a row are equally long: `top_k`, unless the router takes another number for some
tokens. Where experts choose, the experts that took the token are listed, so the lists can be empty.
Within a layer, or a pass of it, rows come in the order of sequence and position.

The key ``etr`` of the file's metadata holds JSON: the fields of `TraceInfo`, and ``format``, which
is 1 for a file without the last two columns and 2 for one with either.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

FORMATS = (1, 2)
"""Without columns of `OPTIONAL`, and with some."""
KEY = b"etr"

_NAMES = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("sequence", pa.int32()),
        ("position", pa.int32()),
        ("token_id", pa.int32()),
        ("text", _NAMES),
        ("domain", _NAMES),
        ("layer", pa.int16()),
        ("experts", pa.list_(pa.int16())),
        ("weights", pa.list_(pa.float32())),
        ("affinities", pa.list_(pa.float32())),
        ("kept", pa.list_(pa.bool_())),
    ]
)
"""Columns of every trace."""
OPTIONAL = pa.schema([("block", pa.int32()), ("step", pa.int32())])
"""Columns of traces in which they mean something, after the others."""
LISTS = ("experts", "weights", "affinities", "kept")


@dataclass(frozen=True, kw_only=True)
class TraceInfo:
    """What a trace is of."""

    num_experts: int
    """Experts in a layer."""
    num_layers: int
    """MoE layers."""
    top_k: int
    """Experts a token may choose."""
    router: str
    """Router's name, or the model type of a model that is not of this library."""
    selection: str
    """How experts selected: threshold, dropless or batch."""
    affinity: str
    """What `affinities` holds: "score" (selection score), "logit" (router logit) or "none"."""
    source: str = ""
    """Where the model came from."""
    columns: tuple[str, ...] = ()
    """Columns of `OPTIONAL` that the file has, in their order."""

    def __post_init__(self) -> None:
        if self.columns != tuple(name for name in OPTIONAL.names if name in self.columns):
            raise ValueError(
                f"columns={self.columns!r} must be some of {', '.join(OPTIONAL.names)}, in this "
                "order"
            )
        for name in ("num_experts", "num_layers", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")

    @property
    def schema(self) -> pa.Schema:
        """Columns of the file, with its metadata."""
        columns = [*SCHEMA, *(OPTIONAL.field(name) for name in self.columns)]
        return pa.schema(columns, self.to_metadata())

    def to_metadata(self) -> dict[bytes, bytes]:
        """Metadata of the file."""
        values = {"format": FORMATS[bool(self.columns)], **dataclasses.asdict(self)}
        if not self.columns:
            del values["columns"]  # a file of the first format is what it always was
        return {KEY: json.dumps(values).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None, where: str) -> TraceInfo:
        """Inverse of `to_metadata`; keys it does not know are left out.

        Args:
            metadata: of a Parquet file.
            where: name of the file, for errors.
        Raises:
            ValueError: the file is not a trace, is of another format, or its metadata is malformed.
        """
        if not metadata or KEY not in metadata:
            raise ValueError(
                f"{where} is a Parquet file but not a routing trace; write one by etr trace"
            )
        values = _object(metadata[KEY], where)
        if values.get("format") not in FORMATS:
            raise ValueError(
                f"{where} is a trace of format {values.get('format')!r}; this version of the "
                f"library reads formats {' and '.join(map(str, FORMATS))}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        try:
            values["columns"] = tuple(values.get("columns", ()))
            return cls(**{name: value for name, value in values.items() if name in known})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} has malformed trace metadata: {error}") from error


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """N tokens that were routed together."""

    sequence: NDArray[np.integer]
    """Sequence, int [N]."""
    position: NDArray[np.integer]
    """Position, int [N]."""
    token_id: NDArray[np.integer]
    """Token id, int [N]."""
    text: Sequence[str] | None
    """The tokens as text, or None."""
    domain: Sequence[str]
    """Names, [N]."""
    block: NDArray[np.integer] | None = None
    """Block, int [N], or None."""
    step: NDArray[np.integer] | None = None
    """Step in its block, int [N], or None."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of `OPTIONAL` that there are."""
        return tuple(name for name in OPTIONAL.names if getattr(self, name) is not None)


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """How one layer routed N tokens: P choices, token after token."""

    counts: NDArray[np.integer]
    """Choices of each token, int [N], P together."""
    experts: NDArray[np.integer]
    """Experts, int [P]."""
    weights: NDArray[np.floating]
    """Weights, float [P]; 0 where dropped."""
    affinities: NDArray[np.floating] | None
    """Affinities, float [P], or None."""
    kept: NDArray[np.bool_]
    """Kept, bool [P]."""

    def __post_init__(self) -> None:
        choices = int(self.counts.sum())
        for name in LISTS:
            values = getattr(self, name)
            if values is not None and len(values) != choices:
                raise ValueError(f"{name} has {len(values)} values; counts add up to {choices}")


def trace_table(tokens: TokenRows, layers: Sequence[LayerRouting]) -> pa.Table:
    """Rows of some tokens in every layer, layer after layer.

    Raises:
        ValueError: a layer routed another number of tokens.
    """
    number = len(tokens.sequence)
    shared: dict[str, Any] = {
        "sequence": pa.array(tokens.sequence, pa.int32()),
        "position": pa.array(tokens.position, pa.int32()),
        "token_id": pa.array(tokens.token_id, pa.int32()),
        "text": _names(tokens.text, number),
        "domain": _names(tokens.domain, number),
    }
    more = {name: pa.array(getattr(tokens, name), pa.int32()) for name in tokens.columns}
    schema = pa.schema([*SCHEMA, *(OPTIONAL.field(name) for name in more)])
    parts = []
    for index, layer in enumerate(layers):
        if len(layer.counts) != number:
            raise ValueError(f"layer {index} routed {len(layer.counts)} tokens, not {number}")
        offsets = pa.array(np.concatenate([[0], np.cumsum(layer.counts)]), pa.int32())
        lists = {name: _lists(getattr(layer, name), offsets, SCHEMA.field(name)) for name in LISTS}
        number_of_layer = pa.array(np.full(number, index), pa.int16())
        columns = {**shared, "layer": number_of_layer, **lists, **more}
        parts.append(pa.table(columns, schema=schema))
    return pa.concat_tables(parts)


def _names(values: Sequence[str] | None, length: int) -> pa.Array:
    if values is None:
        return pa.nulls(length, _NAMES)
    return pa.array(list(values), pa.string()).dictionary_encode()


def _lists(values: NDArray[Any] | None, offsets: pa.Array, field: pa.Field) -> pa.Array:
    if values is None:
        return pa.nulls(len(offsets) - 1, field.type)
    return pa.ListArray.from_arrays(offsets, pa.array(values, field.type.value_type))


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} has malformed trace metadata: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where} has malformed trace metadata: no JSON object")
    return values
