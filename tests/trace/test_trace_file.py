"""Trace files: what is written is read back, and what is no trace is refused with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etr.trace import NO_EXPERT, LayerRouting, TokenRows, TraceInfo, TraceWriter, read_trace
from etr.trace.schema import KEY, OPTIONAL, SCHEMA

INFO = TraceInfo(
    num_experts=4,
    num_layers=2,
    top_k=2,
    router="etr",
    selection="threshold",
    affinity="score",
    source="runs/x",
)


def tokens(number: int, first_sequence: int = 0, domain: str = "prose") -> TokenRows:
    """Rows of three tokens."""
    place = np.arange(number)
    return TokenRows(
        sequence=first_sequence + place // 3,
        position=place % 3,
        token_id=place + 100,
        text=[f"t{i}" for i in range(number)],
        domain=[domain] * number,
    )


def routing(counts: list[int], seed: int = 0, affinities: bool = True) -> LayerRouting:
    generator = np.random.default_rng(seed)
    number = sum(counts)
    kept = generator.random(number) < 0.5
    return LayerRouting(
        counts=np.array(counts),
        experts=generator.integers(0, 4, number),
        weights=np.where(kept, generator.random(number), 0).astype(np.float32),
        affinities=generator.random(number).astype(np.float32) if affinities else None,
        kept=kept,
    )


FIRST = (
    b'{"format": 1, "num_experts": 4, "num_layers": 2, "top_k": 2, "router": "etr", '
    b'"selection": "threshold", "affinity": "score", "source": "runs/x"}'
)
"""Metadata of `INFO` as files of the first format have had them from the beginning."""


def write(path: Path, *parts: tuple[TokenRows, list[LayerRouting]], rows: int = 1000) -> None:
    with TraceWriter(path, INFO, rows_per_group=rows) as writer:
        for part in parts:
            writer.write(*part)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "trace.parquet"
    write(path, (tokens(5), [routing([2] * 5, 1), routing([2] * 5, 2)]))
    return path


def test_round_trip(path):
    trace = read_trace(path)
    assert trace.info == INFO
    assert (trace.num_tokens, trace.domains) == (5, ("prose",))
    for index in (0, 1):
        wanted, layer = routing([2] * 5, index + 1), trace.layer(index)
        for name in ("experts", "weights", "affinities", "kept"):
            np.testing.assert_array_equal(getattr(layer, name).ravel(), getattr(wanted, name))
        for name in ("sequence", "position", "token_id"):
            np.testing.assert_array_equal(getattr(layer, name), getattr(tokens(5), name))
        np.testing.assert_array_equal(
            layer.counts(4, kept=True), np.bincount(wanted.experts[wanted.kept], minlength=4)
        )
    assert trace.rows(0)["text"].to_pylist() == [f"t{i}" for i in range(5)]


def test_tokens_may_have_different_numbers_of_experts(tmp_path):
    counts = [0, 3, 1]
    parts = [routing(counts, 1), routing([0, 0, 0], 2)]
    write(tmp_path / "t", (tokens(3), parts))
    layer = read_trace(tmp_path / "t").layer(0)
    assert layer.experts.shape == (3, 3)
    assert ((layer.experts != NO_EXPERT).sum(1) == counts).all()
    assert list(layer.experts[1]) == list(parts[0].experts[:3])
    assert np.isnan(layer.affinities[0]).all()
    assert not layer.weights[0].any()
    assert read_trace(tmp_path / "t").layer(1).experts.shape == (3, 0)


def test_routers_without_scores_have_no_affinities(tmp_path):
    layers = [routing([1] * 3, affinities=False)] * 2
    write(tmp_path / "t", (tokens(3), layers))
    trace = read_trace(tmp_path / "t")
    assert trace.layer(1).affinities is None
    assert trace.table["affinities"].null_count == 6


@pytest.mark.parametrize(("rows", "groups"), [(1, 3), (20, 2), (1000, 1)])
def test_row_groups_change_nothing(tmp_path, rows, groups):
    parts = [
        (tokens(6, 2 * i, f"domain {i}"), [routing([2] * 6, i), routing([2] * 6, i + 9)])
        for i in range(3)
    ]
    write(tmp_path / "t", *parts, rows=rows)
    assert pq.ParquetFile(tmp_path / "t").num_row_groups == groups
    trace = read_trace(tmp_path / "t")
    assert trace.domains == ("domain 0", "domain 1", "domain 2")
    wanted = np.concatenate([part[1][1].experts for part in parts])
    np.testing.assert_array_equal(trace.layer(1).experts.ravel(), wanted)
    assert list(trace.layer(1).sequence[::3]) == list(range(6))


def test_pandas_reads_it(path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(path)
    assert list(frame.columns) == SCHEMA.names
    assert len(frame) == 10
    trace = read_trace(path)
    one = frame[frame.layer == 1]
    np.testing.assert_array_equal(np.stack(one.experts), trace.layer(1).experts)
    np.testing.assert_array_equal(np.stack(one.weights), trace.layer(1).weights)
    np.testing.assert_array_equal(np.stack(one.kept), trace.layer(1).kept)
    assert list(one.domain.unique()) == ["prose"]


def test_an_error_leaves_the_old_file_and_nothing_else(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="num_layers=2"):
        write(path, (tokens(3), [routing([1] * 3)]))
    with pytest.raises(ValueError, match="layer 1 routed 2 tokens, not 3"):
        write(path, (tokens(3), [routing([1] * 3), routing([1] * 2)]))
    assert path.read_bytes() == before
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="experts has 3 values; counts add up to 4"):
        LayerRouting(
            counts=np.array([2, 2]),
            experts=np.zeros(3, dtype=int),
            weights=np.zeros(4),
            affinities=None,
            kept=np.zeros(4, dtype=bool),
        )


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_trace(tmp_path / "none.parquet")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.99])
def test_a_file_cut_short(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="cut short"):
        read_trace(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 something else", b'{"kind": "train"}\n'])
def test_a_file_of_another_kind(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(ValueError, match="it is not a Parquet file"):
        read_trace(tmp_path / "t")


def test_damage_inside(path):
    content = bytearray(path.read_bytes())
    content[60:80] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read_trace(path)


def test_a_parquet_file_that_is_no_trace(tmp_path):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "t")
    with pytest.raises(ValueError, match="not a routing trace"):
        read_trace(tmp_path / "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3; this version of the library reads formats 1 and 2"),
        ({"columns": ["request"]}, r"columns=\('request',\) must be some of block, step"),
        ({"columns": ["step", "block"]}, "columns=.* in this order"),
        ({"columns": 2}, "malformed"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"top_k": "two"}, "top_k='two'"),
        ({"router": ...}, "router"),
    ],
)
def test_metadata_that_cannot_be_used(path, change, message):
    values = json.loads(INFO.to_metadata()[KEY])
    for name, value in change.items():
        if value is ...:
            del values[name]
        else:
            values[name] = value
    table = pq.read_table(path).replace_schema_metadata({KEY: json.dumps(values)})
    pq.write_table(table, path)
    with pytest.raises(ValueError, match=message):
        read_trace(path)


def test_metadata_of_a_later_version_may_say_more(path):
    values = {**json.loads(INFO.to_metadata()[KEY]), "weather": "fine"}
    table = pq.read_table(path).replace_schema_metadata({KEY: json.dumps(values)})
    pq.write_table(table, path)
    assert read_trace(path).info == INFO


@pytest.mark.parametrize("metadata", [b"{", b"[1]"])
def test_metadata_that_is_no_json_object(path, metadata):
    table = pq.read_table(path).replace_schema_metadata({KEY: metadata})
    pq.write_table(table, path)
    with pytest.raises(ValueError, match="malformed trace metadata"):
        read_trace(path)


def rewrite(path: Path, name: str, values: pa.Array) -> None:
    table = pq.read_table(path)
    table = table.set_column(table.schema.get_field_index(name), SCHEMA.field(name), values)
    pq.write_table(table.replace_schema_metadata(INFO.to_metadata()), path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("experts", [[0, 4]] * 10, "experts holds 0 to 4"),
        ("layer", [7] * 10, "layer holds 7 to 7"),
        ("kept", [[True]] * 10, "kept and experts differ in length"),
    ],
)
def test_values_out_of_range(path, name, value, message):
    rewrite(path, name, pa.array(value, SCHEMA.field(name).type))
    with pytest.raises(ValueError, match=message):
        read_trace(path)


def test_files_without_further_columns_are_those_of_the_first_format(path):
    file = pq.read_schema(path)
    assert file.metadata[KEY] == FIRST
    assert file.names == [
        *("sequence", "position", "token_id", "text", "domain"),
        *("layer", "experts", "weights", "affinities", "kept"),
    ]
    trace = read_trace(path)
    assert trace.info.columns == ()
    assert trace.step is trace.layer(0).block is trace.layer(0).step is None
    table = pq.read_table(path).replace_schema_metadata({KEY: FIRST})
    pq.write_table(table, path)  # as another program would write one
    assert read_trace(path).table.equals(trace.table)


@pytest.mark.parametrize("names", [("block",), ("step",), ("block", "step")])
@pytest.mark.parametrize("rows", [1, 1000])
def test_optional_columns_are_read_back(names, rows, tmp_path):
    info = replace(INFO, columns=names)
    given = {"block": np.arange(6) // 4, "step": np.array([-1, -1, 0, 0, 1, 1])}
    shown = {name: given[name] for name in names}
    with TraceWriter(tmp_path / "t", info, rows_per_group=rows) as writer:
        for first in (0, 2):
            part = replace(tokens(6, first), **shown)
            writer.write(part, [routing([2] * 6), routing([1] * 6)])
    assert json.loads(pq.read_schema(tmp_path / "t").metadata[KEY])["format"] == 2
    assert pq.read_schema(tmp_path / "t").names == [*SCHEMA.names, *names]
    trace = read_trace(tmp_path / "t")
    assert trace.info == info
    for name in OPTIONAL.names:
        for index in (0, 1):
            found = getattr(trace.layer(index), name)
            if name in names:
                np.testing.assert_array_equal(found, np.tile(given[name], 2))
                assert found.dtype == np.int32
            else:
                assert found is None
    np.testing.assert_array_equal(trace.step, trace.layer(0).step)


def test_tokens_have_the_columns_of_their_trace(tmp_path):
    with (
        pytest.raises(ValueError, match=r"columns=\('block',\); the trace has \(\)"),
        TraceWriter(tmp_path / "t", INFO) as writer,
    ):
        writer.write(replace(tokens(3), block=np.zeros(3, int)), [routing([2] * 3)] * 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block", -1, "block holds -1; it must be at least 0"),
        ("step", -2, "step holds -2; it must be at least -1"),
        ("step", None, "step holds null"),
    ],
)
def test_blocks_and_steps_out_of_range(name, value, message, path):
    info = replace(INFO, columns=(name,))
    values = pa.array([0] * 9 + [value], pa.int32())
    table = pq.read_table(path).append_column(name, values)
    pq.write_table(table.replace_schema_metadata(info.to_metadata()), path)
    with pytest.raises(ValueError, match=message):
        read_trace(path)


def test_other_columns(path):
    table = pq.read_table(path).drop_columns(["kept"])
    pq.write_table(table.replace_schema_metadata(INFO.to_metadata()), path)
    with pytest.raises(ValueError, match="other columns"):
        read_trace(path)


def test_no_such_layer(path):
    with pytest.raises(ValueError, match=r"layer=2 must lie in \[0, 2\)"):
        read_trace(path).layer(2)
