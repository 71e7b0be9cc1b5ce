"""Reading a trace. Needs pyarrow and NumPy alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from etr.trace.schema import LISTS, TraceInfo

NO_EXPERT = -1
"""Fills up rows of `LayerTrace.experts` whose token has fewer experts than others."""
_MAGIC = b"PAR1"


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """One layer's routing of N tokens, in the order of the file.

    K is the most experts any token has; shorter rows are filled up with `NO_EXPERT`, weight 0,
    affinity NaN and kept False.
    """

    sequence: NDArray[np.int32]
    """Sequence, int32 [N]."""
    position: NDArray[np.int32]
    """Position, int32 [N]."""
    token_id: NDArray[np.int32]
    """Token id, int32 [N]."""
    experts: NDArray[np.int16]
    """Chosen experts, int16 [N, K]."""
    weights: NDArray[np.float32]
    """Weights, float32 [N, K]."""
    affinities: NDArray[np.float32] | None
    """Affinities, float32 [N, K], or None where the router has no scores."""
    kept: NDArray[np.bool_]
    """Kept, bool [N, K]."""
    block: NDArray[np.int32] | None = None
    """Block, int32 [N], or None where the trace does not say."""
    step: NDArray[np.int32] | None = None
    """Step, int32 [N], or None where the trace does not say."""

    def counts(self, num_experts: int, *, kept: bool = False) -> NDArray[np.int64]:
        """Choices of each expert, or with `kept` those it kept, int64 [E]."""
        used = self.kept if kept else self.experts != NO_EXPERT
        return np.bincount(self.experts[used], minlength=num_experts)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A trace in memory."""

    table: pa.Table
    """The rows, see `etr.trace.schema`."""
    info: TraceInfo
    """What the trace is of."""

    @property
    def num_tokens(self) -> int:
        """Tokens, each of which has a row in every layer."""
        return int(self.table.num_rows) // self.info.num_layers

    @property
    def step(self) -> NDArray[np.int32] | None:
        """Step of each token, int32 [N], for `etr.systems`; None where the trace does not say."""
        return _numpy(self.rows(0)["step"]) if "step" in self.info.columns else None

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in order of appearance."""
        return tuple(pc.unique(self.table["domain"].cast(pa.string())).to_pylist())

    def rows(self, layer: int) -> pa.Table:
        """Rows of one layer.

        Raises:
            ValueError: there is no such layer.
        """
        if not 0 <= layer < self.info.num_layers:
            raise ValueError(f"layer={layer} must lie in [0, {self.info.num_layers})")
        return self.table.filter(pc.equal(self.table["layer"], layer))

    def layer(self, layer: int) -> LayerTrace:
        """One layer as arrays.

        Raises:
            ValueError: there is no such layer.
        """
        rows = self.rows(layer).combine_chunks()
        counts = _numpy(pc.list_value_length(rows["experts"]))
        place = np.arange(counts.max(initial=0)) < counts[:, None]
        has_affinities = rows["affinities"].null_count == 0
        return LayerTrace(
            **{
                name: _numpy(rows[name])
                for name in ("sequence", "position", "token_id", *self.info.columns)
            },
            experts=_grid(rows["experts"], place, NO_EXPERT),
            weights=_grid(rows["weights"], place, 0),
            affinities=_grid(rows["affinities"], place, np.nan) if has_affinities else None,
            kept=_grid(rows["kept"], place, False),
        )

    def choices(self, *, kept: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Experts of every token in every layer, and each token's sequence, for `etr.systems`.

        Args:
            kept: only those that kept the token, and so ran.
        Returns:
            int64 [L, N, K], filled up with `NO_EXPERT`; int32 [N].
        Raises:
            ValueError: layers have other tokens.
        """
        layers = [self.layer(index) for index in range(self.info.num_layers)]
        widest = max(layer.experts.shape[1] for layer in layers)
        found = np.full((len(layers), self.num_tokens, widest), NO_EXPERT, dtype=np.int64)
        for into, layer in zip(found, layers, strict=True):
            if not np.array_equal(layer.sequence, layers[0].sequence):
                raise ValueError("layers of the trace have different tokens; write it again")
            experts = np.where(layer.kept, layer.experts, NO_EXPERT) if kept else layer.experts
            into[:, : experts.shape[1]] = experts
        return found, layers[0].sequence


def read_trace(path: str | Path) -> Trace:
    """Read a trace that `etr trace` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short or damaged, is not a trace, or is one of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"trace {str(path)!r} does not exist; write one by etr trace")
    _check_ends(path)
    with _damage_named(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        info = TraceInfo.from_metadata(file.schema_arrow.metadata, str(path))
        if not file.schema_arrow.equals(info.schema, check_metadata=False):
            raise ValueError(
                f"{path} has other columns than a trace of its format:\n"
                f"{file.schema_arrow.remove_metadata()}"
            )
        table = file.read()
    _check_values(table, info, path)
    return Trace(table=table, info=info)


def _check_ends(path: Path) -> None:
    """A Parquet file begins and ends with its mark; what lacks the second was cut short."""
    with path.open("rb") as file:
        begins = file.read(len(_MAGIC)) == _MAGIC
        size = file.seek(0, 2)
        file.seek(max(size - len(_MAGIC), 0))
        ends = file.read() == _MAGIC and size > 2 * len(_MAGIC)
    if not begins:
        raise ValueError(f"{path} is not a routing trace: it is not a Parquet file")
    if not ends:
        raise ValueError(f"{path} is cut short (its end is missing); write it again")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; write it again") from error


def _check_values(table: pa.Table, info: TraceInfo, path: Path) -> None:
    """Refuse what would be read past an array's end later."""
    layers = pc.min_max(table["layer"]).as_py()
    experts = pc.min_max(pc.list_flatten(table["experts"])).as_py()
    for name, found, limit in (
        ("layer", layers, info.num_layers),
        ("experts", experts, info.num_experts),
    ):
        if found["min"] is not None and not 0 <= found["min"] <= found["max"] < limit:
            values = f"{found['min']} to {found['max']}"
            raise ValueError(f"{path}: {name} holds {values}; it must lie in [0, {limit})")
    for name, least in (("block", 0), ("step", -1)):
        if name not in info.columns:
            continue
        found = pc.min(table[name]).as_py()
        if table[name].null_count or (found is not None and found < least):
            value = "null" if table[name].null_count else found
            raise ValueError(f"{path}: {name} holds {value}; it must be at least {least}")
    if table.num_rows % info.num_layers:
        raise ValueError(f"{path} has {table.num_rows} rows, not the same number in every layer")
    lengths = pc.list_value_length(table["experts"])
    for name in LISTS[1:]:
        if pc.any(pc.not_equal(pc.list_value_length(table[name]), lengths)).as_py():
            raise ValueError(f"{path}: a row's {name} and experts differ in length")


def _numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    return np.asarray(column.to_numpy())


def _grid(column: pa.ChunkedArray, place: NDArray[np.bool_], fill: float) -> NDArray[Any]:
    """Lists as rows of an array, filled up, [N, K]."""
    values = _numpy(pc.list_flatten(column))
    grid = np.full(place.shape, fill, dtype=values.dtype)
    grid[place] = values
    return grid
