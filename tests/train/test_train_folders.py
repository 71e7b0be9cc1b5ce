"""What may be written where: runs, comparisons and models keep out of each other's folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from etr.train import CompareConfig, compare, lock, train
from etr.train.checkpoint import list_checkpoints
from etr.train.folders import writing
from etr.train.loop import Trainer
from etr.train.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
QUICK = {"diagnostics": False, "profile_every": None, "eval_every": 8}


@pytest.fixture
def quick(make_config: Any) -> Any:
    return lambda out, **changes: make_config(out=str(out), **{**QUICK, **changes})


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("content", ["whole", "checkpoints", "metrics.jsonl", "config.json"])
def test_a_comparison_is_not_written_into_a_run(
    quick: Any, data: Any, tmp_path: Path, content: str
) -> None:
    run = tmp_path / "run"
    train(quick(run, steps=2), data=data)
    if content != "whole":
        for path in run.iterdir():
            if path.name != content:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files(run)
    with pytest.raises(ValueError, match="already holds a run of `etr train`"):
        compare(CompareConfig(variants=("baseline",), run=quick(run, steps=2)))
    assert files(run) == before


def test_a_run_is_not_written_into_a_comparison(quick: Any, data: Any, tmp_path: Path) -> None:
    out = tmp_path / "compare"
    compare(CompareConfig(variants=("baseline",), run=quick(out, steps=2)))
    part = out / "baseline-seed0"
    before = files(out)
    for config in (quick(out), quick(out, resume=True), quick(out, auto_resume=True)):
        with pytest.raises(ValueError, match="holds a comparison"):
            train(config, data=data)
    with pytest.raises(ValueError, match="finished run of a comparison"):
        train(quick(part, resume=True, steps=4), data=data)
    assert files(out) == before
    (out / "results.json").unlink()  # as one that is not finished
    with pytest.raises(ValueError, match="holds a comparison"):
        train(quick(out), data=data)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_neither_is_written_into_a_model(quick: Any, data: Any, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"model_type": "mixtral"}')
    with pytest.raises(ValueError, match="holds a model"):
        train(quick(tmp_path), data=data)
    with pytest.raises(ValueError, match="holds a model"):
        compare(CompareConfig(variants=("baseline",), run=quick(tmp_path)))
    assert list(files(tmp_path)) == [name]


def test_results_of_other_rows_are_not_replaced(quick: Any, tmp_path: Path) -> None:
    config = CompareConfig(variants=("baseline", "etr"), run=quick(tmp_path / "c", steps=2))
    compare(config)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"also has etr \(seed 0\); name these too"):
        compare(dataclasses.replace(config, variants=("baseline",)))
    with pytest.raises(ValueError, match=r"also has baseline \(seed 0\), etr \(seed 0\)"):
        compare(dataclasses.replace(config, seeds=(1,)))
    assert files(tmp_path) == before
    found = compare(dataclasses.replace(config, seeds=(0, 1)))
    assert found is not None
    assert len(found["rows"]) == 4


def test_a_comparison_is_not_given_more_steps(quick: Any, data: Any, tmp_path: Path) -> None:
    config = CompareConfig(variants=("baseline",), run=quick(tmp_path / "c", steps=2))
    compare(config)
    (tmp_path / "c" / "baseline-seed0" / "row.json").unlink()
    longer = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=4))
    with pytest.raises(ValueError, match="was begun with steps=2, and steps=4 is asked for"):
        compare(longer)
    assert compare(config) is not None


def test_a_damaged_row_is_named(quick: Any, tmp_path: Path) -> None:
    config = CompareConfig(variants=("baseline",), run=quick(tmp_path / "c", steps=2))
    found = compare(config)
    row = tmp_path / "c" / "baseline-seed0" / "row.json"
    for content, words in (("{", "is not complete JSON"), ("[]", "holds no row of it; remove it")):
        row.write_text(content)
        with pytest.raises(ValueError, match=f"row.json {words}"):
            compare(config)
    row.unlink()
    again = compare(config)
    assert again is not None
    assert found is not None
    assert again["rows"][0]["val_loss"] == found["rows"][0]["val_loss"]


@pytest.mark.parametrize("what", [train, "compare"])
def test_two_writers(
    quick: Any, data: Any, tmp_path: Path, what: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "GRACE_SECONDS", 0.05)
    run = tmp_path / "run"

    def second() -> None:
        if what is train:
            train(quick(run, auto_resume=True), data=data)
        else:
            compare(CompareConfig(variants=("baseline",), run=quick(run)))

    with writing(run), pytest.raises(ValueError, match="locked by process"):
        second()
    assert files(run) == {}


def test_a_comparison_does_not_write_into_a_run_of_its_own_that_trains(
    quick: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "GRACE_SECONDS", 0.05)
    config = CompareConfig(variants=("baseline",), run=quick(tmp_path / "c", steps=2))
    with (
        writing(tmp_path / "c" / "baseline-seed0"),
        pytest.raises(ValueError, match=r"baseline-seed0.*locked by process"),
    ):
        compare(config)


def test_metrics_without_checkpoints_are_never_dropped(
    quick: Any, data: Any, tmp_path: Path
) -> None:
    config = quick(tmp_path / "run")
    for count in (1, 2):
        with Trainer(dataclasses.replace(config, auto_resume=True), data) as trainer:
            trainer.advance()  # and is killed before its first checkpoint
        metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        with pytest.raises(ValueError, match="holds the metrics of a run without checkpoints"):
            train(config, data=data)
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
        with (
            pytest.warns(UserWarning, match=f"starting at step 1 again.*metrics.{count}.jsonl"),
            Trainer(dataclasses.replace(config, auto_resume=True), data),
        ):
            pass
        assert (tmp_path / "run" / f"metrics.{count}.jsonl").read_bytes() == metrics


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(
    quick: Any, data: Any, tmp_path: Path
) -> None:
    config = quick(tmp_path / "run", steps=4, checkpoint_every=2)
    train(config, data=data)
    for path in list_checkpoints(tmp_path / "run"):
        (path / "train_state.json").unlink()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for option in ("resume", "auto_resume"):
        with (
            pytest.warns(UserWarning, match="train_state.json is missing"),
            pytest.raises(ValueError, match=r"every checkpoint of .* is damaged"),
        ):
            train(dataclasses.replace(config, **{option: True}), data=data)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(
    quick: Any, data: Any, tmp_path: Path
) -> None:
    """With one kept, the newest by number is the damaged one until it is written anew."""
    config = quick(tmp_path / "run", checkpoint_every=4, keep_checkpoints=2)
    train(config, data=data)
    old, new = list_checkpoints(tmp_path / "run")
    (new / "model.safetensors").write_bytes(b"")
    again = dataclasses.replace(config, resume=True, checkpoint_every=1, keep_checkpoints=1)
    with pytest.warns(UserWarning, match="is damaged"):
        resumed = Trainer(again, data)
    with resumed as trainer:
        trainer.advance()
        names = [path.name for path in list_checkpoints(tmp_path / "run")]
        assert names == ["step-00000005", "step-00000008"]
        while not trainer.finished:
            trainer.advance()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000008"]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert json.loads((new / "train_state.json").read_text())["step"] == 8
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 9))
    assert not old.exists()
