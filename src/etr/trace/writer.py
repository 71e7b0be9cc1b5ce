"""Writing a trace while a model runs, in bounded memory."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from etr.files import whole_file
from etr.trace.schema import LayerRouting, TokenRows, TraceInfo, trace_table

ROWS_PER_GROUP = 1 << 16
"""Rows held in memory before they are written."""


class TraceWriter:
    """Writes a trace; the file appears under its name when the block ends without an error.

        with TraceWriter(path, info) as writer:
            writer.write(tokens, layers)

    Args:
        path: the file; its folder is made, an old file is replaced at the end.
        info: what the trace is of.
        rows_per_group: rows (tokens times layers) held in memory before they are written.
    """

    def __init__(
        self, path: str | Path, info: TraceInfo, rows_per_group: int = ROWS_PER_GROUP
    ) -> None:
        self.path, self.info = Path(path), info
        self.num_tokens = 0
        """Tokens written so far."""
        self._rows_per_group = rows_per_group
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> TraceWriter:
        with contextlib.ExitStack() as opened:
            temporary = opened.enter_context(whole_file(self.path))
            self._file = opened.enter_context(
                pq.ParquetWriter(
                    temporary, self.info.schema, compression="zstd", write_page_checksum=True
                )
            )
            opened.push(lambda kind, *_: None if kind else self._flush())
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.__exit__(kind, error, trace)

    def write(self, tokens: TokenRows, layers: Sequence[LayerRouting]) -> None:
        """Add tokens, each with its routing in every layer.

        Raises:
            ValueError: another number of layers than announced, or of tokens in a layer; or other
                columns.
        """
        if len(layers) != self.info.num_layers:
            raise ValueError(
                f"{len(layers)} layers; the trace has num_layers={self.info.num_layers}"
            )
        if tokens.columns != self.info.columns:
            raise ValueError(
                f"tokens have columns={tokens.columns}; the trace has {self.info.columns}"
            )
        self._waiting.append(trace_table(tokens, layers))
        self.num_tokens += len(tokens.sequence)
        if sum(table.num_rows for table in self._waiting) >= self._rows_per_group:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting).unify_dictionaries().combine_chunks()
            self._file.write_table(table, row_group_size=max(table.num_rows, 1))
        self._waiting = []
