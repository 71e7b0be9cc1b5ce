"""The routing-trace file: one Parquet row per token and MoE layer.

    sequence    int32          number of the text row the token stands in, from 0
    position    int32          place among the row's real tokens, from 0
    token_id    int32          vocabulary id
    text        dictionary     the token as text; null where no tokenizer was given
    domain      dictionary     name of the domain the text is of
    layer       int16          number of the MoE layer, from 0 (dense layers do not count)
    experts     list<int16>    chosen experts, best first where tokens choose
    weights     list<float>    weight of each expert's output in the token's sum; 0 if dropped
    affinities  list<float>    what ranked each choice; null where the router has no scores
    kept        list<bool>     False where the expert dropped the token

The four lists of a row are equally long: `top_k`, unless the router takes another number for some
tokens. Where experts choose, the experts that took the token are listed, so the lists can be empty.
Within a layer, rows come in the order of sequence and position.

The key ``etr`` of the file's metadata holds JSON: the fields of `TraceInfo`, and ``format``.
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

FORMAT = 1
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
"""Columns of a trace."""
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

    def __post_init__(self) -> None:
        for name in ("num_experts", "num_layers", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")

    def to_metadata(self) -> dict[bytes, bytes]:
        """Metadata of the file."""
        return {KEY: json.dumps({"format": FORMAT, **dataclasses.asdict(self)}).encode()}

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
        if values.get("format") != FORMAT:
            raise ValueError(
                f"{where} is a trace of format {values.get('format')!r}; this version of the "
                f"library reads format {FORMAT}"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        try:
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
    parts = []
    for index, layer in enumerate(layers):
        if len(layer.counts) != number:
            raise ValueError(f"layer {index} routed {len(layer.counts)} tokens, not {number}")
        offsets = pa.array(np.concatenate([[0], np.cumsum(layer.counts)]), pa.int32())
        lists = {name: _lists(getattr(layer, name), offsets, SCHEMA.field(name)) for name in LISTS}
        number_of_layer = pa.array(np.full(number, index), pa.int16())
        parts.append(pa.table({**shared, "layer": number_of_layer, **lists}, schema=SCHEMA))
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
