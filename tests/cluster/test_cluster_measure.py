"""The all-to-all curve, on three ranks of this machine."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from gloo_ranks import start

from etr.cli.cluster import run
from etr.cluster.measure import MeasureConfig, NetworkCurve, join_group

WORLD = 3


def worker(rank: int, folder: str) -> None:
    """What torchrun sets, for two ranks on one node and one on another."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "GROUP_RANK": str(int(rank == 2)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": Path(folder, "port").read_text(),
    }
    options = ("--out", f"{folder}/curve", "--rounds", "2", "--sizes", "1024", "65536")
    assert run(["measure", *options]) == 0


@pytest.mark.distributed
def test_measure_writes_curve_and_figure(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "port").write_text(str(server.getsockname()[1]))
    start(worker, (str(tmp_path),), WORLD)
    found = json.loads((tmp_path / "curve" / "curve.json").read_text())
    assert set(found) == set(NetworkCurve.__dataclass_fields__)
    assert found["node_of_rank"] == [0, 0, 1]
    assert found["sizes"] == [1024, 65536]
    assert min(found["seconds"]) > 0
    assert [pair[:2] for pair in found["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    for line in ("line", "within", "between"):
        assert found[line]["bytes_per_second"] > 0
    assert (tmp_path / "curve" / "all-to-all.svg").read_text().startswith("<svg")


def test_without_a_launcher_the_command_is_said(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"):
        join_group()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"sizes": (5, 5)}, "sizes="),
        ({"rounds": 0}, "rounds=0"),
        ({"most_pairs": 0}, "most_pairs=0"),
    ],
)
def test_the_measurement_is_checked(values, text):
    with pytest.raises(ValueError, match=text):
        MeasureConfig(**values)
