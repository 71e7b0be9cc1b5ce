"""Trackers: what they are told, where they write, and what is said when one is missing."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest

from etr.train import loop, recorder, train
from etr.train.loop import Trainer
from etr.train.metrics import read_metrics
from etr.train.trackers import TRACKERS, scalars

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def rows_of(out: str, kind: str) -> list[dict]:
    return [r for r in read_metrics(Path(out) / "metrics.jsonl") if r["kind"] == kind]


def needs(name: str) -> None:
    for package in (name, "accelerate"):
        pytest.importorskip(package, reason=f"the extra {name!r} is not installed")


def test_rows_become_flat_numbers():
    row = {
        "kind": "train",
        "step": 3,
        "loss": 2.5,
        "losses": {"aux": 0.01},
        "memory_bytes": None,
        "layers": [{"capacity": 12.0, "num_tokens_per_expert": [1, 2]}, {"capacity": None}],
        "grad_norm": math.inf,
        "tokens": 7,
    }
    assert scalars(row) == {
        "train/loss": 2.5,
        "train/losses/aux": 0.01,
        "train/layer0/capacity": 12.0,
        "train/tokens": 7.0,
    }
    served = {"kind": "eval", "step": 3, "selection": "threshold", "val_loss": 1.0}
    assert scalars(served) == {"eval/threshold/val_loss": 1.0}
    alarm = {"kind": "alarm", "step": 3, "name": "x", "layer": 1, "message": "y"}
    assert scalars(alarm) == {"alarm/x": 1.0}


class Recording:
    def __init__(self) -> None:
        self.logged: list[tuple[int | None, dict[str, Any]]] = []
        self.ended = False

    def start(self) -> None: ...

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.ended = True


def test_a_tracker_is_told_each_row_once(make_config, data, monkeypatch):
    recording = Recording()
    monkeypatch.setattr(loop, "require_trackers", lambda names: None)
    monkeypatch.setattr(recorder, "open_trackers", lambda names, run, after_step: [recording])
    config = make_config(trackers=("wandb",))
    train(config, data=data)
    assert recording.ended
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    assert recording.logged == [(row["step"], scalars(row)) for row in rows]
    assert [step for step, values in recording.logged if "train/loss" in values] == [*range(1, 9)]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_tracker_is_named_before_anything_is_written(
    make_config, data, name, monkeypatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package: None if package == name else found(package)
    )
    config = make_config(trackers=(name,))
    with pytest.raises(ValueError, match=rf"{name} needs the package {name}.*etr-moe\[{name}\]"):
        train(config, data=data)
    assert not Path(config.out).exists()


def test_tensorboard_gets_the_curves(make_config, data):
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config(trackers=("tensorboard",), diagnostics=True)
    with Trainer(config, data) as trainer:
        for _ in range(6):  # two steps past the checkpoint, as if killed there
            trainer.advance()
    train(dataclasses.replace(config, resume=True), data=data)
    events = EventAccumulator(str(Path(config.out) / "tensorboard"))
    events.Reload()
    losses = [row["loss"] for row in rows_of(config.out, "train")]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses)
    assert [e.step for e in events.Scalars("train/loss")] == [*range(1, 9)]
    assert [e.step for e in events.Scalars("eval/dropless/val_loss")] == [4, 8]
    assert events.Scalars("diagnostics/layer1/mutual_information_bits")[0].step == 0


def test_wandb_runs_offline_side_by_side(make_config, data, tmp_path, monkeypatch):
    needs("wandb")
    for variable in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    configs = [
        make_config(out=str(tmp_path / name), trackers=("wandb",), steps=2, profile_every=None)
        for name in ("one", "two")
    ]
    one, two = (Trainer(config, data) for config in configs)
    with one, two:
        while not two.finished:
            one.advance()
            two.advance()
    importlib.import_module("wandb").teardown()  # its service may still be writing
    for config in configs:
        (stored,) = (Path(config.out) / "wandb").glob("offline-run-*/run-*.wandb")
        assert stored.stat().st_size > 0
        assert b"train/loss" in stored.read_bytes()


def test_trackio_keeps_its_own_store(make_config, data, tmp_path):
    needs("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    config = make_config(trackers=("trackio",), steps=2, profile_every=None)
    train(config, data=data)
    rows = SQLiteStorage.get_logs(tmp_path.name, "run")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses == pytest.approx([row["loss"] for row in rows_of(config.out, "train")])
