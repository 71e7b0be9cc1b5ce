"""The benchmark's parts; its whole path runs by name only, as it trains models."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from etr.cluster import why_unavailable
from etr.cluster.bench import run as bench_run
from etr.cluster.bench.book import local_share
from etr.cluster.bench.page import page
from etr.cluster.bench.plan import (
    MIXED_TEXT,
    OWN_TEXT,
    RANKS,
    REAL,
    RECIPES,
    ROWS,
    BenchConfig,
)
from etr.cluster.bench.plan import nodes_of as nodes_of_shape
from etr.cluster.bench.prediction import predict
from etr.cluster.bench.run import bench, results
from etr.cluster.bench.sharding import deal
from etr.cluster.bench.sleep import SleepingExperts
from etr.moe.dispatch import parse_dispatcher
from etr.recipes.cluster import FULL, SMOKE

LINE = {"latency_seconds": 1e-3, "bytes_per_second": 25e6}
RESULTS = Path(__file__).parents[2] / "docs/results"
CURVE = {"line": LINE, "within": LINE, "between": LINE}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_can_be_built(name):
    parse_dispatcher(ROWS[name].dispatch)
    assert name in (*OWN_TEXT, *MIXED_TEXT)
    FULL.training(FULL.run_of("2x2", "own", name, 0), "somewhere").model.moe_config()


def test_training_that_nodes_do_not_change_is_done_once():
    names = [run.name for run in FULL.runs()]
    assert len(names) == len(set(names))
    assert "baseline-own-any-seed1" in names
    assert {"etr-own-2x2-seed2", "etr-own-4x1-seed2", "sharded-mixed-2x2-seed1"} <= set(names)
    assert not RECIPES["baseline"].needs_nodes


@pytest.mark.parametrize(("shape", "nodes"), [("2x2", (0, 0, 1, 1)), ("4x1", (0, 1, 2, 3))])
def test_nodes_of_a_shape(shape, nodes):
    assert nodes_of_shape(shape) == nodes


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"shapes": ("3x3",)}, "shapes="),
        ({"variants": ("nonsense",)}, "variants="),
        ({"rounds": 0}, "rounds=0"),
        ({"seeds": ()}, "seeds="),
        ({"compute_ratio": -1.0}, "compute_ratio=-1.0"),
        ({"other_ratios": (-0.5,)}, "compute_ratio=-0.5"),
    ],
)
def test_the_plan_is_checked(values, text):
    with pytest.raises(ValueError, match=text):
        BenchConfig(**values)


def test_deal_gives_rows_to_the_node_they_use_and_as_many_to_each_rank():
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(16, generator=generator)
    shares = torch.stack([first, 1 - first], dim=1)
    dealt = deal(shares, (0, 0, 1, 1))
    assert dealt.shape == (4, 4)
    assert sorted(dealt.flatten().tolist()) == list(range(16))
    # With two nodes the best deal is by rank: the half that uses node 0 most goes there.
    assert set(dealt[:2].flatten().tolist()) == set(first.topk(8).indices.tolist())


def test_local_share_counts_by_node():
    counts = [[4, 1, 0, 0], [1, 2, 1, 0], [0, 0, 5, 5], [1, 0, 0, 0]]
    assert local_share(counts, (0, 0, 1, 1)) == (5 + 3 + 10 + 0) / 20
    assert local_share(counts, (0, 1, 2, 3)) == (4 + 2 + 5 + 0) / 20


def test_sleeping_experts_give_rows_back_and_take_their_time():
    experts = SleepingExperts(
        name="x", padded=False, engine=lambda problem: None, summary="", seconds_per_row=1e-3
    )
    rows = torch.randn(20, 3, requires_grad=True)
    began = time.perf_counter()
    out = experts.run(rows, torch.tensor([20]), None)
    forward = time.perf_counter()
    out.sum().backward()
    assert forward - began >= 0.020
    assert time.perf_counter() - forward >= 0.040
    assert torch.equal(out, rows)
    assert torch.equal(rows.grad, torch.ones_like(rows))


def test_prediction_of_a_step_by_hand():
    config = dataclasses.replace(SMOKE, compute_ratio=0.0)
    rows = torch.zeros(1, RANKS, RANKS)
    rows[0, 0, 2] = 1000  # the only link in use
    timed = {"shape": "2x2", "rows": rows.tolist(), "row_bytes": 100}
    # Four exchanges of 0.1 MB at 25 MB/s, a millisecond each.
    assert predict(config, timed, CURVE, "all_to_all") == pytest.approx(4 * (1e-3 + 4e-3))
    # Each chunk has a latency of its own; without compute there is nothing to overlap.
    chunked = predict(config, timed, CURVE, "chunked:all_to_all,chunks=3")
    assert chunked == pytest.approx(4 * (3e-3 + 4e-3))


def invented(config: BenchConfig) -> dict:
    """Results in which the ETR rows take half of the baseline's time and lose 0.01 nats."""
    trained, timed = {}, []
    for run in config.runs():
        better = run.recipe in ("etr", "etr-published")
        trained[run.name] = {
            "val_loss": 1.5 + 0.1 * run.seed + 0.01 * better,
            "chosen": [[10] * 8] * RANKS,
            "kept": [[9] * 8] * RANKS,
            "max_violation": 0.25,
        }
    for shape, text, variant in config.cells():
        for seed in config.seeds:
            better = variant in ("etr", "etr-published")
            timed += [
                {
                    "shape": shape,
                    "variant": variant,
                    "compute": compute,
                    "run": vars(config.run_of(shape, text, variant, seed)),
                    "seconds": [1.0 - (0.4 if "-at-" in compute else 0.5) * better] * 3,
                    "bytes_between_nodes": 100.0 - 70 * better,
                    "rows": torch.ones(2, RANKS, RANKS).tolist(),
                    "row_bytes": 128,
                }
                for compute in config.computes(shape, text, variant)
                if compute != REAL
            ]
    return {"trained": trained, "timed": timed, "curves": dict.fromkeys(config.shapes, CURVE)}


def test_page_says_what_the_results_say():
    config = dataclasses.replace(FULL, rounds=1)
    text = page(config, invented(config))
    assert "| baseline: top-1, factor 1.1, padded | 1.000 | 1.00 (1.00 to 1.00)" in text
    assert "| `etr-published` | step time / baseline | 0.50 | 0.50 | met |" in text
    assert "| `etr-published` | bytes between nodes / baseline | 0.35 | 0.30 | met |" in text
    assert "+0.010 (+0.010 to +0.010) | higher |" in text
    assert "## 4x1: 4 nodes of 1, own text" in text
    assert "## 2x2: mixed text" in text
    assert "| 2x2 | own | 0.50 | 0.50 | 0.25 | missed | +0.000 (+0.000 to +0.000) |" in text
    assert "over the baseline's: 0.30; the target was 0.60 at most, met." in text
    assert "| 2 | default ETR: schedule to 1.1, locality, chunked | 0.600 | 0.60 (" in text
    assert "## Real compute" not in text  # none was timed


def test_the_page_is_what_its_results_say():
    stored = json.loads((RESULTS / "cluster.json").read_text())
    assert page(dataclasses.replace(FULL, rounds=1), stored) == (RESULTS / "cluster.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.distributed
@pytest.mark.skipif(
    why_unavailable() is not None, reason=f"no cluster can be emulated: {why_unavailable()}"
)
def test_the_whole_path_and_that_nothing_runs_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_run, "CURVE_SIZES", (1 << 16, 1 << 20))
    variants = ("baseline", "etr-published", "sharded")
    config = dataclasses.replace(SMOKE, out=str(tmp_path), steps=4, variants=variants)
    lines: list[str] = []
    assert bench(config, lines.append) == 0
    found = results(tmp_path)
    assert len(found["trained"]) == len(config.runs())
    (corpus,) = {one["corpus"] for one in found["trained"].values()}
    assert f"(corpus {corpus})" in (tmp_path / "cluster.md").read_text()
    assert {one["variant"] for one in found["timed"]} == set(config.variants)
    assert found["curves"]["2x2"]["sizes"] == list(bench_run.CURVE_SIZES)
    assert all(one["bytes_between_nodes"] > 0 for one in found["timed"])
    assert "baseline" in (tmp_path / "cluster.md").read_text()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/*.json")}
    assert bench(config, lines.append) == 0
    again = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/*.json")}
    assert stamps == again
    with pytest.raises(ValueError, match="holds another benchmark: steps is"):
        bench(dataclasses.replace(config, steps=9), lines.append)
    json.dumps(found)
