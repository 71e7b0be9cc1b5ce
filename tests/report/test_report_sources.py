"""Reports of run folders, comparison folders and mixtures, whole, cut, short and empty."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from invented_results import make_results
from invented_rows import alarm, diagnostics, profile

from etr.cli import main
from etr.report import draw_figures, load_report, write_report
from etr.report.chart import Drawing


def _train(step: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "train", "step": step, "loss": 2.0, "drop_rate": 0.1, **fields}


def make_run(folder: Path, *lines: dict[str, Any], config: Any = None) -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def _evaluation(step: int, selection: str, loss: float) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "selection": selection, "val_loss": loss}


def test_a_run_says_of_itself_what_a_comparison_would(tmp_path: Path) -> None:
    routing = {"router": {"name": "etr"}, "capacity": None, "eval_selection": "threshold"}
    run = make_run(
        tmp_path / "mine",
        _train(1, tokens=64, expert_flops=10.0, step_time_seconds=0.2),
        _evaluation(1, "threshold", 2.5),
        _train(2, tokens=128, expert_flops=30.0, step_time_seconds=0.4),
        _evaluation(2, "threshold", 1.5),
        _evaluation(2, "dropless", 1.25),
        config={"seed": 7, "model": {"routing": routing}},
    )
    report = load_report(run)
    assert not report.results.is_comparison
    (row,) = report.results.rows
    assert (row.name, row.seed, row.router, row.capacity) == ("mine", 7, "etr", "default")
    assert row.selection == "threshold"
    assert row.causal is None
    expected = {
        "steps": 2,
        "tokens": 128,
        "val_loss": 1.5,
        "val_loss_dropless": 1.25,
        "drop_rate": 0.1,
        "step_time_seconds_median": pytest.approx(0.3),
        "expert_flops_per_step": 15.0,
        "expert_flops_total": 30.0,
        "parameters": None,
    }
    assert {key: row.values[key] for key in expected} == expected


def test_a_finished_run_of_a_comparison_keeps_its_row(tmp_path: Path) -> None:
    run = make_run(tmp_path / "etr-seed3", _train(1))
    row = make_results(tmp_path / "other", seeds=1, steps=1, variants=1)["rows"][0]
    (run / "row.json").write_text(json.dumps({"config": {}, "row": {**row, "seed": 3}}))
    (found,) = load_report(run).results.rows
    assert (found.name, found.seed) == ("etr-seed3", 3)
    assert found.values["parameters"] == row["parameters"]
    assert found.metrics is not None


def test_comparisons_and_runs_share_a_page_and_nothing_is_judged_across(
    tmp_path: Path, few: int
) -> None:
    for name in ("first", "second"):
        make_results(tmp_path / name, seeds=2, steps=3, variants=2, layers=1)
    run = make_run(tmp_path / "alone", *(_train(step) for step in range(1, 6)))
    report = load_report([tmp_path / "first", tmp_path / "second", run])
    assert [part.name for part in report.parts] == ["first", "second", "Single runs"]
    assert report.results.names == (
        "first/baseline 1.1",
        "first/linear 1.1",
        "second/baseline 1.1",
        "second/linear 1.1",
        "alone",
    )
    assert not report.results.is_comparison
    text = write_report(report, tmp_path / "report.html").read_text()
    for heading in ("Results: first", "Results: second", ">Single runs<"):
        assert heading in text
    assert text.count("What the numbers say") == 2
    assert "no difference between them is judged here" in text
    assert "The variants differ in steps" not in text  # each comparison has one length


def test_folders_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place / "run", _train(1)) for place in "ab"]
    names = load_report([*runs, runs[0]]).results.names
    assert len(names) == 2
    assert names[0].endswith("a/run")


def test_an_unfinished_comparison_is_shown_by_its_runs(tmp_path: Path) -> None:
    make_results(tmp_path / "whole", seeds=1, steps=2, variants=2, layers=1)
    folder = tmp_path / "unfinished"
    for name in ("0-0", "1-0"):
        shutil.copytree(tmp_path / "whole" / "runs" / name, folder / name)
    report = load_report(folder)
    assert report.results.names == ("0-0", "1-0")
    assert not report.results.is_comparison


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_without_runs_is_refused(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "x"
    if made:
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"give the folder of a run, or of what"):
        load_report([folder])
    with pytest.raises(ValueError, match="runs is empty"):
        load_report([])


def test_damage_shortness_and_novelty_are_said_and_survived(tmp_path: Path) -> None:
    cut = make_run(tmp_path / "cut", _train(1), _train(2))
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "lo')
    runs = [
        cut,
        make_run(tmp_path / "empty"),
        make_run(tmp_path / "one", _train(1)),
        make_run(tmp_path / "longer", *(_train(step) for step in range(1, 30))),
        make_run(tmp_path / "newer", _train(1, novel=1), _train(2), {"kind": "aura", "step": 1}),
        make_run(tmp_path / "broken", _train(1), _train(2)),
    ]
    (runs[-1] / "metrics.jsonl").write_text('{"kind"\n{"kind": "train", "step": 1}\n')
    (runs[0] / "config.json").write_text('{"seed"')
    page = write_report(runs, tmp_path / "report.html").read_text()
    for sentence in (
        "cut: the last line of metrics.jsonl (line 3) is cut and left out.",
        "cut: config.json is not complete JSON and left out.",
        "empty: no training step is logged yet.",
        "one; broken: one training step alone is logged, its curves are points.",
        "newer: metrics.jsonl has 1 key that the report does not read: novel.",
        "newer: metrics.jsonl has 1 kind of line that the report does not read: aura.",
        "broken: metrics.jsonl has 1 line left out: line 1 is not a JSON object.",
        "The variants differ in steps (cut and newer: 2; one and broken: 1; longer: 29).",
    ):
        assert sentence in page, sentence
    figures = {figure.key: figure for figure in draw_figures(runs)}
    drawn = {key for key, figure in figures.items() if isinstance(figure, Drawing)}
    assert drawn == {"loss-by-steps", "drop-rate"}
    assert "Not shown, no values: empty and broken." in figures["drop-rate"].caption  # type: ignore[union-attr]


def test_seeds_of_different_lengths_are_said(tmp_path: Path, few: int) -> None:
    make_results(tmp_path, seeds=2, steps=4, variants=1, layers=1)
    path = tmp_path / "runs" / "0-1" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in lines if '"step": 4' not in line))
    page = write_report(tmp_path, tmp_path / "report.html").read_text()
    assert "The seeds of baseline 1.1 end at different steps (3 to 4)" in page


def test_rows_of_every_kind_are_read_and_bad_fields_cost_themselves_alone(tmp_path: Path) -> None:
    import numpy as np

    good = diagnostics(5, 2, 4, True, np.random.default_rng(0))
    bad = {**good, "step": 6, "token_correlation": [[1.0], [1.0, 2.0]], "layers": "none"}
    run = make_run(tmp_path / "run", _train(1), good, bad, profile(5), alarm(4), alarm(4))
    (row,) = load_report(run).results.rows
    metrics = row.metrics
    assert metrics is not None
    assert [d.step for d in metrics.diagnostics] == [5, 6]
    first, second = metrics.diagnostics
    assert first.layers[1].affinity is not None
    assert first.layers[0].expert_similarity is not None
    assert first.layers[0].expert_similarity.shape == (4, 4)
    assert second.layers == ()
    assert second.token_correlation is None
    assert metrics.profiles[0].seconds["idle"] == 0.006
    assert metrics.profiles[0].operators[0].name == "aten::bmm"
    assert len(metrics.alarms) == 1
    assert [note for note in metrics.notes if "does not read" in note] == []


def test_the_command_takes_several_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], few: int
) -> None:
    make_results(tmp_path / "compare", seeds=1, steps=1, variants=1, layers=1)
    run = make_run(tmp_path / "run", _train(1))
    page = tmp_path / "all.html"
    arguments = [str(tmp_path / "compare"), str(run), "--out", str(page), "--title", "Both"]
    assert main(["report", *arguments]) == 0
    assert "<h1>Both</h1>" in page.read_text()
    assert 'download="loss-by-steps.csv.gz"' in page.read_text()
    printed = capsys.readouterr().out
    assert "Single runs" in printed
    assert f"report: {page}" in printed
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").exists()
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err
