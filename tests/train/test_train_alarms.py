"""Alarms on invented rows: raised once, in time, and only where something is wrong."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from etr.cli._progress import TrainingProgress
from etr.train import loop, train
from etr.train.alarms import Alarms
from etr.train.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

ALPHA = 0.01
EVEN = [[25, 25, 25, 25], [25, 25, 25, 25]]


def train_row(
    choices: list[list[int]] = EVEN,
    *,
    factor: float | None = 1.0,
    drop_rate: float | None = None,
    balance: float = 1.2,
    violation: float = 0.1,
    norms: tuple[float | None, ...] = (1.0, 1.0),
    kept: list[list[int]] | None = None,
) -> dict[str, Any]:
    """A row in which every expert keeps up to `factor` times the mean load; None: no limit."""
    capacity = None if factor is None else factor * sum(choices[0]) / len(choices[0])
    if kept is None:
        kept = [[n if capacity is None else min(n, round(capacity)) for n in r] for r in choices]
    total = sum(map(sum, choices))
    if drop_rate is None:
        drop_rate = 1 - sum(map(sum, kept)) / total
    return {
        "kind": "train",
        "step": 1,
        "kept_fraction": 1 - drop_rate,
        "drop_rate": drop_rate,
        "capacity_factor": 4.0 if factor is None else factor,
        "max_violation": violation,
        "losses": {"aux": ALPHA * balance},
        "layers": [
            {
                "num_choices_per_expert": choice_row,
                "num_tokens_per_expert": kept_row,
                "capacity": capacity,
                "router_grad_norm": norm,
            }
            for choice_row, kept_row, norm in zip(choices, kept, norms, strict=True)
        ],
    }


def eval_row(kept: float, selection: str = "threshold") -> dict[str, Any]:
    return {"kind": "eval", "step": 1, "selection": selection, "kept_fraction_eval": kept}


def names(alarms: Alarms, rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[alarm.name for alarm in alarms.update(row)] for row in rows]


def fresh(patience: int = 3) -> Alarms:
    return Alarms({"aux": ALPHA}, patience=patience)


def test_nothing_is_wrong():
    rows = [train_row() for _ in range(50)] + [eval_row(1.0), eval_row(1.0, "dropless")]
    assert not any(names(fresh(), rows))


BAD = {
    "collapsed_expert": train_row([[0, 50, 25, 25], [25, 25, 25, 25]], factor=None),
    "dead_router_gradient": train_row(norms=(1.0, 0.0)),
    "balance_loss_blind": train_row(balance=1.02, violation=1.5),
}


@pytest.mark.parametrize(("name", "bad"), BAD.items())
def test_raised_once_and_armed_again_when_clear(name, bad):
    alarms = fresh()
    assert names(alarms, [bad] * 10) == [[], [], [name], *[[]] * 7]
    assert not any(names(alarms, [train_row()] * 2 + [bad] * 3))  # two clear rows are too few
    assert not any(names(alarms, [train_row()] * 3))
    assert names(alarms, [bad] * 3)[-1] == [name]


@pytest.mark.parametrize(("name", "bad"), BAD.items())
def test_a_short_spell_raises_nothing(name, bad):
    assert not any(names(fresh(), [bad, bad, train_row()] * 5))


def test_collapse_names_layer_and_experts():
    alarms = fresh()
    row = train_row([[25, 25, 25, 25], [0, 70, 0, 30]], factor=None)
    (alarm,) = [alarm for _ in range(5) for alarm in alarms.update(row)]
    assert alarm.layer == 1
    assert "layer 1: no token reached expert 0, 2 for 3 steps" in alarm.message


def test_a_router_without_parameters_has_no_dead_gradient():
    assert not any(names(fresh(), [train_row(norms=(None, None))] * 10))


def test_without_balance_loss_nothing_is_blind():
    alarms = Alarms({}, patience=2)
    assert not any(names(alarms, [train_row(balance=1.0, violation=3.0)] * 5))


def uneven(share: float) -> list[list[int]]:
    """Loads of which the first takes `share` and the others what is left."""
    rest = round((1 - share) * 1000 / 3)
    return [[1000 - 3 * rest, rest, rest, rest]] * 2


def test_a_schedule_explains_its_drops():
    """From factor 1.2 to 0.5 at an uneven but steady load, drops rise by half of all choices."""
    rows = [train_row(uneven(0.35), factor=1.2 - 0.7 * i / 200) for i in range(200)]
    assert rows[-1]["drop_rate"] - rows[0]["drop_rate"] > 0.4
    assert not any(names(fresh(patience=20), rows))


def test_a_load_that_becomes_uneven_raises_the_drop_alarm():
    alarms = fresh(patience=20)
    rows = [train_row(uneven(0.25 + 0.4 * min(i / 100, 1))) for i in range(150)]
    found = [name for row in names(alarms, rows) for name in row]
    assert found == ["rising_drop_rate"]
    back = [train_row(uneven(0.25)) for _ in range(150)]
    assert not any(names(alarms, back))
    assert ["rising_drop_rate"] in names(alarms, rows)


def test_drops_without_a_capacity_are_not_judged():
    rows = [train_row(factor=None, drop_rate=0.01 * i) for i in range(60)]
    assert not any(names(fresh(), rows))


@pytest.mark.parametrize("kept", [0.55, 0.65])
def test_thresholds_out_of_date(kept):
    alarms = fresh()
    for _ in range(20):
        alarms.update(train_row(factor=0.6))
    close, far = eval_row(0.61), eval_row(kept)
    assert names(alarms, [close, far, far, eval_row(1.0, "dropless"), close, far]) == [
        [],
        ["thresholds_out_of_date"],
        [],
        [],
        [],
        ["thresholds_out_of_date"],
    ]


def test_evaluation_before_any_step_raises_nothing():
    assert not fresh().update(eval_row(0.1))


def test_patience_is_checked():
    with pytest.raises(ValueError, match="patience=0"):
        Alarms({}, patience=0)


def test_a_dead_router_is_written_once_also_across_a_restart(make_config, data, monkeypatch):
    monkeypatch.setattr(loop, "Alarms", functools.partial(Alarms, patience=3))
    monkeypatch.setattr(loop, "router_grad_norms", lambda model, ranks: [1.0, 0.0])
    config = make_config("baseline", profile_every=None, diagnostics=False)
    seen: list[dict[str, Any]] = []
    with loop.Trainer(config, data) as trainer:
        for _ in range(5):  # one step past the checkpoint, as if killed there
            trainer.advance(seen.append)
    train(dataclasses.replace(config, resume=True), data=data, on_step=seen.append)
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    for found in (seen, rows):
        dead = [row for row in found if row.get("name") == "dead_router_gradient"]
        assert [(row["kind"], row["layer"], row["step"]) for row in dead] == [("alarm", 1, 3)]


def test_alarms_are_printed_and_extras_are_not(capsys):
    console = Console(width=200)
    progress = TrainingProgress(Progress(console=console, disable=True), console, 100)
    progress.step("etr", {"kind": "alarm", "step": 7, "message": "layer 0: something"})
    for kind in ("diagnostics", "profile"):
        progress.step("etr", {"kind": kind, "step": 50})
    assert capsys.readouterr().out.split() == [
        "etr",
        "step",
        "7",
        "ALARM",
        "layer",
        "0:",
        "something",
    ]


def test_thresholds_that_let_through_too_much_are_named_where_experts_choose():
    """Their shares are 1 on both sides; pairs per choice tell them apart."""
    alarms = fresh()
    for _ in range(20):
        alarms.update(train_row(factor=1.0) | {"kept_fraction": 1.0, "kept_per_choice": 2.0})
    close, far = ({**eval_row(1.0), "kept_per_choice": kept} for kept in (2.01, 2.4))
    assert names(alarms, [close, far]) == [[], ["thresholds_out_of_date"]]
