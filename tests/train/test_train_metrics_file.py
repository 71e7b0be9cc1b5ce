"""metrics.jsonl that is not as it was written: what is lost, and what a resumed run makes of it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from etr.train import CompareConfig, compare, train
from etr.train.loop import Trainer
from etr.train.metrics import MetricsFile, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

TRAIN = {
    **dict.fromkeys(("tokens", "expert_flops", "step_time_seconds", "loss"), 1.0),
    **dict.fromkeys(("kept_fraction", "drop_rate", "capacity_factor", "max_violation"), 0.5),
    "losses": {"aux": 0.01},
    "layers": [{"num_tokens_per_expert": [1, 2], "num_choices_per_expert": [3, 4]}],
}


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, **TRAIN, **changes}


def lacks(name: str) -> bytes:
    return json.dumps({k: v for k, v in row(2).items() if k != name}).encode()


DAMAGED = {
    "no JSON": (b'{"kind": "train", "ste', "is not a JSON object"),
    "a number": (b"7", "is not a JSON object"),
    "not UTF-8": (b'{"kind": "train", "step": 2, "x": "\xff"}', "is not a JSON object"),
    "too deep": (b"[" * 100_000, "is not a JSON object"),
    "zeros": (b"\0" * 512, "is not a JSON object"),
    "no step": (b'{"kind": "train"}', "has no step"),
    "step of text": (json.dumps(row("2")).encode(), "has no step"),  # type: ignore[arg-type]
    "step true": (json.dumps(row(True)).encode(), "has no step"),
    "no loss": (lacks("loss"), "has no number 'loss'"),
    "loss too large": (json.dumps(row(2, loss=10**400)).encode(), "has no number 'loss'"),
    "no layers": (lacks("layers"), "no counts of its layers"),
    "layers differ": (
        json.dumps(row(2, layers=[*TRAIN["layers"], {}])).encode(),  # type: ignore[misc]
        "no counts of its layers",
    ),
    "losses of text": (json.dumps(row(2, losses={"aux": "low"})).encode(), "has no losses"),
    "no selection": (b'{"kind": "eval", "step": 2}', "has no number 'val_loss'"),
}


@pytest.mark.parametrize(("line", "why"), DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_line_stays_and_is_named(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "metrics.jsonl"
    first, third = (json.dumps(row(step)).encode() for step in (1, 3))
    later = json.dumps(row(4)).encode()
    path.write_bytes(b"\n".join([first, line, third, later, b'{"kind": "tra']))
    with pytest.warns(UserWarning, match=f"not rows of metrics.* line 2 .*{why}"):
        assert [found["step"] for found in read_metrics(path)] == [1, 3, 4]
    file = MetricsFile(path, after_step=3)
    file.write(row(4))
    file.close()
    assert path.read_bytes() == b"\n".join([first, line, third, later, b""])


def test_a_cut_last_line_is_dropped_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = json.dumps(row(1)).encode() + b"\n"
    for end in range(1, len(first) - 1):
        path.write_bytes(first + first[:end])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_metrics(path) == [row(1)]
        MetricsFile(path, after_step=9).close()
        assert path.read_bytes() == first


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row(1)))
    file = MetricsFile(path, after_step=1)
    file.write(row(2))
    file.close()
    assert read_metrics(path) == [row(1), row(2)]


QUICK = {"diagnostics": False, "profile_every": None, "eval_every": 8}


def test_a_run_goes_on_over_damaged_lines(make_config: Any, data: Any, tmp_path: Path) -> None:
    whole, cut = (make_config(out=str(tmp_path / name), **QUICK) for name in ("whole", "cut"))
    train(whole, data=data)
    with Trainer(cut, data) as trainer:
        for _ in range(6):  # two steps past the checkpoint, as if killed there
            trainer.advance()
    path = tmp_path / "cut" / "metrics.jsonl"
    first, *others = path.read_bytes().splitlines()
    damaged = [line for line, _ in DAMAGED.values()]
    path.write_bytes(b"\n".join([first, *damaged, *others, b'{"kind": "tra']))
    with pytest.warns(UserWarning, match=rf"line 2 .* and {len(damaged) - 5} more"):
        train(dataclasses.replace(cut, resume=True), data=data)
    first, *others = path.read_bytes().splitlines()
    assert others[: len(damaged)] == damaged
    path.write_bytes(b"\n".join([first, *others[len(damaged) :]]))
    losses = [
        [row["loss"] for row in read_metrics(Path(config.out) / "metrics.jsonl") if "loss" in row]
        for config in (whole, cut)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == whole.steps


def test_a_comparison_counts_the_rows_that_are_left(make_config: Any, tmp_path: Path) -> None:
    config = CompareConfig(
        variants=("baseline", "etr"), run=make_config(out=str(tmp_path / "c"), **QUICK)
    )
    found = compare(config)
    assert found is not None
    for line, _ in DAMAGED.values():
        path = tmp_path / "c" / "etr-seed0" / "metrics.jsonl"
        whole = path.read_bytes()
        path.write_bytes(line + b"\n" + whole)
        with pytest.warns(UserWarning, match="line 1"):
            again = compare(config)
        assert again is not None
        assert again["rows"] == found["rows"]
        path.write_bytes(whole)
