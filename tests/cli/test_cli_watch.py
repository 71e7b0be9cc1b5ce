"""`etr watch`: what is read of a growing run, what a frame shows, and how it ends."""

from __future__ import annotations

import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import etr.cli.watch
from etr.cli import main
from etr.cli.watch import Watched, frames
from etr.report.dashboard import duration, load_bars, sparkline, status
from etr.report.live import NUM_ALARMS, LiveRun, MetricsTail, find_runs


def train_row(step: Any, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "tokens": 100 * step,
        "elapsed_seconds": 0.5 * step,
        "step_time_seconds": 0.5,
        "tokens_per_second": 200.0,
        "loss": 6.0 / step,
        "drop_rate": 0.125,
        "capacity_mean": 37.0,
        "max_violation": 0.5,
        "tokens_without_expert": 0.0,
        "layers": [
            {"num_choices_per_expert": [10, 30, 0, 40], "num_tokens_per_expert": [10, 20, 0, 20]},
            {"num_choices_per_expert": [20, 20, 20, 20], "num_tokens_per_expert": [20, 20, 20, 20]},
        ],
        **changes,
    }


def eval_row(step: int, **changes: Any) -> dict[str, Any]:
    values = {"kind": "eval", "step": step, "selection": "threshold", "val_loss": 4.25}
    return {**values, **changes}


def alarm_row(step: int, **changes: Any) -> dict[str, Any]:
    values = {"kind": "alarm", "step": step, "layer": 1, "name": "collapsed_expert"}
    return {**values, "message": "expert 2 gets [bold]nothing[/bold]", **changes}


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(folder: Path, *rows: dict[str, Any], steps: int = 10) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"steps": steps}))
    if rows:
        (folder / "metrics.jsonl").write_text(lines(*rows))
    return folder


def append(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(text)


def shown(watched: Watched, width: int = 100, height: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, height=height)
    watched.poll()
    console.print(watched.frame(console))
    return console.file.getvalue()


# The tail


def test_rows_are_read_once_and_half_lines_wait(tmp_path):
    path = tmp_path / "m"
    tail = MetricsTail(path)
    assert tail.poll() == ([], False)
    whole = lines({"a": "ä"}, {"b": 2}).replace("\\u00e4", "ä").encode()
    for end in range(1, len(whole) + 1):
        with path.open("ab") as file:
            file.write(whole[end - 1 : end])
        rows, anew = tail.poll()
        assert not anew
        done = whole[:end].count(b"\n") - whole[: end - 1].count(b"\n")
        assert len(rows) == done
    assert rows == [{"b": 2}]
    assert tail.poll() == ([], False)


def test_a_replaced_file_is_read_again(tmp_path):
    path = tmp_path / "m"
    path.write_text(lines({"a": 1}, {"a": 2}, {"a": 3}))
    tail = MetricsTail(path)
    tail.poll()
    (tmp_path / "new").write_text(lines({"a": 1}, {"a": 9}, {"a": 10}, {"a": 11}))
    os.replace(tmp_path / "new", path)
    rows, anew = tail.poll()
    assert anew
    assert [row["a"] for row in rows] == [1, 9, 10, 11]


@pytest.mark.parametrize("after", [[1], [1, 2, 30, 40, 50]])
def test_a_file_rewritten_in_place_is_read_again(tmp_path, after):
    """Shorter, or longer with other content where the last row was."""
    path = tmp_path / "m"
    path.write_text(lines(*({"a": i} for i in (1, 2, 3))))
    tail = MetricsTail(path)
    tail.poll()
    path.write_text(lines(*({"a": i} for i in after)))
    rows, anew = tail.poll()
    assert anew
    assert [row["a"] for row in rows] == after


def test_a_file_that_vanished(tmp_path):
    path = tmp_path / "m"
    path.write_text(lines({"a": 1}))
    tail = MetricsTail(path)
    tail.poll()
    path.unlink()
    assert tail.poll() == ([], True)
    path.write_text(lines({"a": 2}))
    assert tail.poll()[0] == [{"a": 2}]


def test_damaged_lines_are_counted(tmp_path):
    path = tmp_path / "m"
    deep = "[" * 100_000
    path.write_text(f'{{"a": 1}}\nnonsense\n[1]\n\n{deep}\n{{"a": 2}}\n')
    tail = MetricsTail(path)
    assert tail.poll()[0] == [{"a": 1}, {"a": 2}]
    assert tail.num_damaged == 3


# The run


def test_what_is_known_of_a_run(tmp_path):
    folder = make_run(tmp_path / "run", *(train_row(i) for i in (1, 2)), steps=10)
    run = LiveRun(folder=folder)
    assert run.poll()
    assert not run.poll()
    assert (run.step, run.total_steps, run.seconds_left) == (2, 10, 4.0)
    assert run.losses == [6.0, 3.0]
    append(folder, lines(eval_row(2), *(alarm_row(2) for _ in range(NUM_ALARMS + 5))))
    append(folder, lines({"kind": "diagnostics", "step": 2}, train_row(3, loss=None)))
    assert run.poll()
    assert run.evaluations["threshold"]["val_loss"] == 4.25
    assert (len(run.alarms), run.num_alarms) == (NUM_ALARMS, NUM_ALARMS + 5)
    assert math.isnan(run.losses[-1])


def test_a_resumed_run_forgets_what_was_cut(tmp_path):
    folder = make_run(tmp_path / "run", *(train_row(i) for i in range(1, 9)), alarm_row(8))
    run = LiveRun(folder=folder)
    run.poll()
    (folder / "config.json").write_text(json.dumps({"steps": 20}))
    (folder / "metrics.tmp").write_text(lines(*(train_row(i) for i in range(1, 4))))
    os.replace(folder / "metrics.tmp", folder / "metrics.jsonl")
    assert run.poll()
    assert (run.step, len(run.losses), run.num_alarms, run.total_steps) == (3, 3, 0, 20)


def test_finished_means_evaluated(tmp_path):
    folder = make_run(tmp_path / "run", train_row(10))
    run = LiveRun(folder=folder)
    run.poll()
    assert not run.finished
    append(folder, lines(eval_row(10)))
    run.poll()
    assert run.finished
    assert status(run, 0.0) == "finished"


def test_status(tmp_path):
    run = LiveRun(folder=make_run(tmp_path / "run"))
    run.poll()
    assert status(run, 0.0) == "waiting for the first step"
    append(run.folder, lines(train_row(1)))
    run.poll()
    assert status(run, run.modified + 5) == "running"
    assert status(run, run.modified + 125) == "nothing new for 2:05"


@pytest.mark.parametrize("content", ["{", "[1]", '{"steps": "many"}', '{"steps": 0}'])
def test_a_config_that_tells_no_steps(tmp_path, content):
    folder = make_run(tmp_path / "run", train_row(1))
    (folder / "config.json").write_text(content)
    run = LiveRun(folder=folder)
    run.poll()
    assert (run.total_steps, run.seconds_left, run.finished) == (None, None, False)
    assert "step 1 " in shown(Watched(folder))


# The frame


@pytest.mark.parametrize(
    ("values", "width", "wanted"),
    [
        ([], 5, ""),
        ([1, 2, 3, 4, 5, 6, 7, 8], 8, "▁▂▃▄▅▆▇█"),
        ([1, 3, 7, 9], 2, "▁█"),
        ([2, 2], 5, "▄▄"),
        ([1, math.nan, 2], 3, "▁ █"),
        ([math.nan, math.inf], 2, ""),
    ],
)
def test_sparkline(values, width, wanted):
    assert sparkline(values, width) == wanted


@pytest.mark.parametrize(
    ("choices", "width", "wanted"),
    [
        ([1, 1, 1, 1], 4, "▄▄▄▄"),
        ([0, 4, 0, 0], 4, "▁█▁▁"),
        ([1, 1], 8, "▄▄▄ ▄▄▄ "),
        ([0, 0, 2, 0], 2, "▁█"),
        ([0, 0], 2, "▁▁"),
        ([], 2, ""),
    ],
)
def test_load_bars(choices, width, wanted):
    assert load_bars(choices, width).plain == wanted


@pytest.mark.parametrize(
    ("seconds", "wanted"), [(None, "\N{EN DASH}"), (0, "0:00"), (62.4, "1:02"), (3723, "1:02:03")]
)
def test_duration(seconds, wanted):
    assert duration(seconds) == wanted


def test_a_frame_says_it_all(tmp_path):
    rows = [train_row(i, memory_bytes=3 * 10**9) for i in range(1, 5)]
    folder = make_run(tmp_path / "run", *rows, eval_row(4), alarm_row(4))
    text = shown(Watched(folder))
    for wanted in (
        "step 4/10",
        "400 tokens",
        "elapsed 0:02",
        "left 0:03",
        "1.5000 nats/token",
        "4.2500 threshold, step 4",
        "200 tokens/s",
        "12.5\N{NO-BREAK SPACE}%",
        "37 tokens/expert",
        "3 GB",
        "collapsed_expert",
        "expert 2 gets [bold]nothing[/bold]",
        "running",
    ):
        assert wanted in text, wanted
    first, second = (line.split() for line in text.splitlines() if "▄▄▄▄" in line or "▂▂▂▂" in line)
    assert first[1:-1] == ["0", "▂▂▂▂", "▆▆▆▆", "▁▁▁▁", "████", "1.00", "37.5", "%"]
    assert second[1:-1] == ["1", *["▄▄▄▄"] * 4, "0.00", "0.0", "%"]


def test_what_layers_tell_beside_their_load(tmp_path):
    row = train_row(1)
    for layer, capacity in zip(row["layers"], (123.0, None), strict=True):
        layer["capacity"] = capacity
        layer["kept_affinity_mass"] = 0.75
    text = shown(Watched(make_run(tmp_path / "run", row)))
    heading, first, second = text.partition("load by expert")[2].splitlines()[:3]
    assert heading.split()[2:-1] == ["capacity", "kept", "mass"]
    assert first.split()[-4:-1] == ["123", "75.0", "%"]
    assert second.split()[-4:-1] == ["\N{EN DASH}", "75.0", "%"]


def test_many_layers_fit_the_terminal(tmp_path):
    row = train_row(1)
    row["layers"] *= 20
    text = shown(Watched(make_run(tmp_path / "run", row)), height=30)
    assert len(text.splitlines()) <= 30
    assert "and 28 layers more" in text


@pytest.mark.parametrize(
    "change",
    [
        {"layers": None},
        {"layers": [3]},
        {"layers": [{"num_choices_per_expert": None}]},
        {"layers": []},
        {"loss": "high", "tokens": None, "elapsed_seconds": []},
        {"drop_rate": float("nan")},
    ],
)
def test_odd_rows_do_not_stop_it(tmp_path, change):
    assert "speed" in shown(Watched(make_run(tmp_path / "run", train_row(1, **change))))


# The folder


def test_an_empty_run_waits(tmp_path):
    for folder in (make_run(tmp_path / "a"), make_run(tmp_path / "b")):
        if folder.name == "b":
            (folder / "metrics.jsonl").write_text("")
        assert "waiting for the first step" in shown(Watched(folder))


def test_a_comparison_lists_its_runs_and_details_the_newest(tmp_path):
    old = make_run(tmp_path / "baseline-seed0", train_row(3))
    new = make_run(tmp_path / "etr-seed0", train_row(2))
    (tmp_path / "figures").mkdir()
    os.utime(old / "metrics.jsonl", (1000, 1000))
    assert find_runs(tmp_path) == [old, new]
    watched = Watched(tmp_path)
    text = shown(watched, width=120)
    assert "baseline-seed0" in text
    assert "▸  etr-seed0" in text
    assert "step 2/10" in text
    assert "step 3/10" not in text


def test_a_comparison_stays_with_a_run_until_it_is_finished(tmp_path):
    first = make_run(tmp_path / "a-seed0", train_row(1))
    second = make_run(tmp_path / "b-seed0", train_row(1))
    os.utime(first / "metrics.jsonl", (1000, 1000))
    watched = Watched(tmp_path)
    watched.poll()
    assert watched.focus.folder == second
    append(first, lines(train_row(2)))
    watched.poll()
    assert watched.focus.folder == second
    third = make_run(tmp_path / "c-seed0", train_row(1))
    append(second, lines(train_row(10), eval_row(10)))
    os.utime(third / "metrics.jsonl", (4e9, 4e9))
    watched.poll()
    assert watched.focus.folder == third
    assert len(watched.runs) == 3


@pytest.mark.parametrize("name", ["none", "empty", "foreign"])
def test_no_such_run(tmp_path, name, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "mixtral"}')
    assert main(["watch", str(tmp_path / name)]) == 2
    wanted = "is not a folder" if name == "none" else "holds no run"
    assert wanted in capsys.readouterr().err


# The command


def test_once_prints_a_frame(tmp_path, capsys):
    folder = make_run(tmp_path / "run", train_row(4))
    assert main(["watch", str(folder), "--once"]) == 0
    assert "step 4/10" in capsys.readouterr().out


def test_without_a_terminal_it_prints_one_frame(tmp_path, capsys):
    assert main(["watch", str(make_run(tmp_path / "run", train_row(4)))]) == 0
    assert capsys.readouterr().out.count("step 4/10") == 1


def test_frames_follow_the_run_to_its_end(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", train_row(1))
    news = [lines(train_row(9)), lines(train_row(10))[:-20], lines(train_row(10))[-20:]]
    news += [lines(eval_row(10))]

    def go_on(_: float) -> None:
        if news:
            append(folder, news.pop(0))

    monkeypatch.setattr(etr.cli.watch.time, "sleep", go_on)
    console = Console(file=io.StringIO(), width=100, height=40)
    seen = []
    for frame in frames(Watched(folder), console, 1.0):
        console.file = io.StringIO()
        console.print(frame)
        seen.append(console.file.getvalue())
    steps = [next(n for n in (10, 9, 1) if f"step {n}/10" in text) for text in seen]
    assert steps == [1, 9, 9, 10, 10, 10]
    assert "finished" in seen[-1]
    assert "finished" not in seen[-3]


def test_ctrl_c_ends_it_cleanly(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "run", train_row(4))

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    terminal = Console(file=io.StringIO(), width=100, height=40, force_terminal=True)
    monkeypatch.setattr(etr.cli.watch, "Console", lambda **_: terminal)
    monkeypatch.setattr(etr.cli.watch.time, "sleep", interrupt)
    assert main(["watch", str(folder)]) == 0
    text = terminal.file.getvalue()
    assert "step 4/10" in text
    assert "\x1b[?25h" in text  # the cursor is back
    assert "interrupted" not in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "-1", "nan"])
def test_the_interval_is_checked(tmp_path, interval, capsys):
    folder = make_run(tmp_path / "run")
    with pytest.raises(SystemExit):
        main(["watch", str(folder), f"--interval={interval}"])
    assert "interval=" in capsys.readouterr().err
