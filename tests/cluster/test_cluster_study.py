"""The study of equal wall time: its plan, its clock's summary, its page, and the whole path."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from etr.cluster import why_unavailable
from etr.cluster.study.page import compared, page
from etr.cluster.study.plan import CHUNKED, PADDED, RANKS, Condition, EqualTimeStudy
from etr.cluster.study.runner import EqualTimeRunner, summary
from etr.recipes.time_to_loss import equal_time, smoke
from etr.study.collection import Collection
from etr.study.grid import Block, runs_of
from etr.study.run import Run, execute
from etr.study.summary import rows_of
from etr.study.tasks import TASKS, open_task

FULL = equal_time()


def test_every_row_can_be_built_and_has_a_name_of_its_own() -> None:
    runs: dict[tuple[str, str], Run] = {}
    for block in (*FULL.blocks, *smoke().blocks):
        assert len(set(block.rows)) == len(block.rows)
        for run in runs_of(dataclasses.replace(block, seeds=(0,)), lambda *_: 1.0):
            assert runs.setdefault((run.task, run.row), run).variant == run.variant
    for run in runs.values():
        run.config().model.moe_config()


def test_every_matched_row_is_run_at_equal_steps_before() -> None:
    done: set[tuple[str, str]] = set()
    for block in FULL.blocks:
        if block.match == "steps":
            done |= {(block.task, row) for row in block.rows}
        else:
            assert {(block.task, row) for row in (*block.rows, FULL.reference)} <= done
    assert {FULL.dispatch(row) for row in ("padded-1.1", "locmoe")} == {PADDED}
    assert FULL.dispatch(FULL.reference) == CHUNKED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": 0}, "points=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"conditions": {}}, r"conditions=\[\] must be of"),
        ({"inter": "fast"}, "inter='fast' must be a positive number"),
    ],
)
def test_a_plan_is_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(smoke(), **change)
    with pytest.raises(ValueError, match="shape='3x1' must have 4 ranks"):
        Condition(shape="3x1", compute_ratio=1.0)
    with pytest.raises(ValueError, match="compute_ratio=-1"):
        Condition(shape="2x2", compute_ratio=-1)


def test_a_row_takes_the_stated_share_of_its_time_on_the_network() -> None:
    # 96 floats, 8 bits a byte, two ranks a node, 200 Mbit/s.
    seconds = FULL.seconds_per_row(Condition(shape="2x2", compute_ratio=0.25), 96)
    assert seconds == pytest.approx(0.25 * 96 * 4 * 8 * 2 / 200e6)
    assert Condition(shape="4x1", compute_ratio=1.0).node_of_rank == (0, 1, 2, 3)


def test_readers_of_own_text_read_domains_of_their_own() -> None:
    task, config = open_task("text-x-own", TASKS["text-x-own"].config(1)), TASKS["text-x"].config(4)
    for batch in itertools.islice(task.training_batches(config), 3):
        assert batch.input_ids.shape == (8, 256)
        for rank in range(RANKS):
            assert set((batch.domain[2 * rank : 2 * rank + 2] % RANKS).tolist()) == {rank}
    odd = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=6))
    with pytest.raises(ValueError, match="batch_size=6"):
        next(iter(task.training_batches(odd)))


def _timed(*rounds: list[float]) -> dict[str, Any]:
    kept = [[3.0, 1.0], [2.0, 2.0], [0.0, 4.0], [1.0, 3.0]]
    seconds = list(rounds)
    return {"seconds": seconds, "kept": kept, "bytes_between_nodes": 8, "bytes_within_node": 2}


def test_the_time_of_a_schedule_is_the_mean_over_its_points() -> None:
    timed = {"a": _timed([1.0, 3.0], [2.0, 2.0]), "b": _timed([1.0, 1.0], [1.0, 2.0])}
    found = summary(timed, "a", Condition(shape="2x2", compute_ratio=1.0), 32)
    assert found["a"]["mean_ratio"] == 1.0
    assert found["a"]["error"] == 0.0
    logs = [math.log(0.5), math.log(0.75)]
    assert found["b"]["mean_ratio"] == pytest.approx(math.exp(sum(logs) / 2))
    assert found["b"]["error"] == pytest.approx((logs[1] - logs[0]) / 2)
    assert found["b"]["seconds_by_point"] == [1.0, 1.5]
    assert found["b"]["local_share"] == (3 + 2 + 4 + 3) / 16
    assert found["b"]["kept_per_token"] == 0.5


def _result(name: str, seed: int, loss: float, steps: int) -> dict[str, Any]:
    mode = {"loss": loss, "kept_per_token": 0.9, "dropped_loss": None, "kept_loss": loss}
    return {
        "run": {"task": "text-x", "variant": f"{name}=etr", "steps": steps, "seed": seed},
        "steps": steps,
        "max_violation_last": 0.1,
        "environment": {"torch": "0", "python": "0", "machine": "m", "threads": 1, "corpus": "c"},
        "final": {"served_loss": loss, "served": "dropless", "dropless": mode},
    }


def _rows(steps: int, **losses: list[float]) -> Any:
    found = [
        _result(name, seed, loss, steps)
        for name, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return tuple(rows_of(found))


def test_the_page_compares_in_equal_time_and_carries_the_clock_over(tmp_path: Path) -> None:
    """b takes half of a's time: twice the steps, and .2 nats lower than a where it was .1 above."""
    blocks = (
        Block(name="equal", task="text-x", variants=("a=etr", "b=etr"), steps=100, seeds=(0, 1)),
        Block(
            name="cluster",
            task="text-x",
            variants=("b=etr",),
            steps=100,
            seeds=(0, 1),
            match="seconds",
        ),
    )
    plan = EqualTimeStudy(
        blocks=blocks,
        reference="a",
        conditions={"cluster": Condition(shape="2x2", compute_ratio=1.0)},
    )
    study = Collection(
        blocks={
            "equal": ("text-x", "steps", _rows(100, a=[1.0, 1.2], b=[1.1, 1.3])),
            "cluster": ("text-x", "seconds", _rows(200, b=[0.8, 1.0])),
        },
        times={},
    )
    timed = {"mean_ratio": 1.0, "error": 0.0, "seconds": 1.0, "bytes_between_nodes": 9.0}
    timed |= {"local_share": 0.5, "kept_per_token": 1.0}
    half = {**timed, "mean_ratio": 0.5, "seconds": 0.5, "bytes_between_nodes": 3.0}
    measured = {"cluster": {"rows": {"a": timed, "b": half}, "tokens_per_rank": 64}}
    (found,) = compared(study, plan, measured)
    assert found.less.mean == pytest.approx(-0.2)
    assert found.slope == pytest.approx(0.3 / math.log(2))
    assert found.survives
    half["error"] = 0.5  # the clock says little: so does the difference
    (unsure,) = compared(study, plan, measured)
    assert unsure.less.mean == found.less.mean
    assert unsure.less.verdict == "cannot be told apart"
    half["error"] = 0.0
    text = page(study, plan, measured, tmp_path)
    assert "the lowest is `b`, -0.2000" in text
    assert "told apart as lower: `b`" in text
    assert "| 0.2 | `b` -0.039 |" in text  # .1 above, and .2 ln 2 for the time saved
    assert "| 0.05 | `a` +0.000 |" in text
    assert (tmp_path / "images/time-to-loss-text-x-2x2-1.svg").exists()


@pytest.mark.slow
@pytest.mark.skipif(why_unavailable() is not None, reason="no cluster can be emulated here")
def test_the_whole_path_and_that_nothing_runs_twice(tmp_path: Path) -> None:
    runner = EqualTimeRunner(study=smoke(), out=tmp_path, weights=tmp_path / "weights")
    text = runner.run((), lambda *_: None).read_text()
    for row in ("linear-0.6", "padded-1.1", "linear-0.6-local-0.1"):
        assert f"| `{row}` |" in text
    files = sorted((tmp_path / "time-to-loss").rglob("*.json"))
    assert sum("times-2x2-0.25" in path.name for path in files) == 1
    before = {path: path.stat().st_mtime_ns for path in files}
    assert runner.run((), lambda *_: None).read_text() == text
    assert before == {path: path.stat().st_mtime_ns for path in files}


def test_a_run_learns_from_the_locality_of_the_nodes_that_it_plays(tmp_path: Path) -> None:
    """On one node, where every expert is at home, it learns something else."""
    variant = smoke().blocks[0].variants[-1]
    assert "locality" in variant
    result = execute(Run(task="text-x-own", variant=variant, steps=2, seed=0), tmp_path)
    plain = variant.replace("local-0.1", "plain").replace(",nodes=2", ",nodes=1")
    other = execute(Run(task="text-x-own", variant=plain, steps=2, seed=0), tmp_path)
    assert result["final"]["served_loss"] != other["final"]["served_loss"]
