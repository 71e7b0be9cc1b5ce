"""The whole path on a few steps: runs, resume, matched steps, timing, page, replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from etr.cli import main
from etr.data import DataConfig, open_data
from etr.methods import METHODS, import_file
from etr.recipes.study import FULL, SMOKE
from etr.study.grid import Block, runs_of
from etr.study.queue import load, run_all
from etr.study.run import Run, execute
from etr.study.study import StudyRunner

VARIANT = "linear-1.1=token_choice/rank_by=score/capacity=factor:capacity_factor=1.1"


@pytest.mark.slow
def test_the_smoke_study_writes_its_page_and_goes_on_where_it_was(tmp_path: Path) -> None:
    runner = StudyRunner(study=SMOKE, out=tmp_path, weights=tmp_path / "weights")
    seen: dict[str, int] = {}
    page = runner.run((), lambda block, done, total: seen.__setitem__(block, done)).read_text()
    assert set(seen) == {block.name for block in SMOKE.blocks}
    for block in SMOKE.blocks:
        assert f"`{block.task}`: {block.name}" in page
        for row in block.rows:
            assert f"`{row}`" in page
    for heading in ("Verdicts", "Step times", "What the experts are like", "limited"):
        assert heading in page
    assert f"Text: corpus {open_data(DataConfig()).corpus}." in page
    images = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert "quality-capacity.svg" in images
    assert all(f"images/{name}" in page for name in images)
    # Nothing runs again; the page is the same.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "quality").rglob("*.json")}
    again = runner.run((), lambda *_: None).read_text()
    assert again == page
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "quality").rglob("*.json")}


def test_a_run_can_be_repeated_exactly_and_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(task="teacher-50", variant=VARIANT, steps=6, seed=1)
    first = execute(run, tmp_path / "a")
    second = execute(run, tmp_path / "b")
    assert first["final"]["served_loss"] == second["final"]["served_loss"]
    assert first["curve"][-1]["step"] == 6
    assert main(["study", "--replay", str(run.path(tmp_path / "a")), "--out", str(tmp_path)]) == 0
    assert f"{first['final']['served_loss']:.6f}" in capsys.readouterr().out


def test_finished_runs_are_not_run_again_and_a_foreign_file_is_refused(tmp_path: Path) -> None:
    run = Run(task="teacher-50", variant=VARIANT, steps=2, seed=0)
    execute(run, tmp_path)
    stamp = run.path(tmp_path).stat().st_mtime_ns
    run_all([run], tmp_path)
    assert load(run, tmp_path) is not None
    assert run.path(tmp_path).stat().st_mtime_ns == stamp
    result = json.loads(run.path(tmp_path).read_text())
    result["run"]["variant"] = "linear-1.1=token_choice/rank_by=score/capacity=none"
    run.path(tmp_path).write_text(json.dumps(result))
    with pytest.raises(ValueError, match="holds another run"):
        load(run, tmp_path)


def test_a_failing_run_stops_the_study_with_its_own_error(tmp_path: Path) -> None:
    run = Run(task="teacher-50", variant=VARIANT, steps=2, seed=0)
    (tmp_path / "teacher-50").write_text("in the way of the folder")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        run_all([run], tmp_path)


def test_matched_rows_get_steps_in_proportion() -> None:
    block = Block(
        name="b", task="text-x", variants=(VARIANT,), steps=1000, seeds=(0,), match="seconds"
    )
    assert [run.steps for run in runs_of(block, lambda *_: 0.8)] == [1250]
    assert [run.steps for run in runs_of(block, lambda *_: 2.0)] == [500]


def test_a_matched_block_needs_what_it_is_matched_to(tmp_path: Path) -> None:
    runner = StudyRunner(study=SMOKE, out=tmp_path, weights=tmp_path / "weights")
    with pytest.raises(ValueError, match="runs missing"):
        runner.runs(SMOKE.block("headline, matched"))
    with pytest.raises(ValueError, match="choose from"):
        SMOKE.block("nothing")


def test_blocks_named_in_any_order_run_in_that_of_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = StudyRunner(study=SMOKE, out=tmp_path, weights=tmp_path / "weights")
    order: list[str] = []
    monkeypatch.setattr(StudyRunner, "runs", lambda self, block: [])
    monkeypatch.setattr(
        StudyRunner, "_run_block", lambda self, block, runs, show: order.append(block.name)
    )
    runner.run(["headline, matched", "capacity"], lambda *_: None)
    assert order == ["capacity", "headline, matched"]


@pytest.mark.parametrize("study", [FULL, SMOKE], ids=["full", "smoke"])
def test_recipes_are_sound(study: object) -> None:
    names = [block.name for block in study.blocks]
    assert len(set(names)) == len(names)
    for block in study.blocks:
        assert len(set(block.rows)) == len(block.rows)
        for run in runs_of(block, lambda *_: 1.0):
            run.config()


@pytest.mark.parametrize(
    ("field", "value"), [("task", "nothing"), ("steps", 0), ("variant", "nothing")]
)
def test_bad_runs_are_refused(field: str, value: object) -> None:
    good = {"task": "teacher-50", "variant": VARIANT, "steps": 2, "seed": 0}
    with pytest.raises(ValueError, match=str(value)):
        Run(**{**good, field: value})


def test_workers_run_files_of_ones_own(tmp_path: Path) -> None:
    """A worker is another process: it knows the method because it was told the file."""
    file = tmp_path / "my_file.py"
    file.write_text(
        "import etr\n"
        "from etr.methods import Card\n"
        "etr.methods.add(Card(name='of_a_file', title='Mine', summary='a try', level='model',\n"
        "    branch='training', claim='It is 1.', options={'router': 'token_choice:bias=true'}))\n",
        encoding="utf-8",
    )
    import_file(file)
    try:
        run = Run(task="teacher-50", variant="of_a_file", steps=2, seed=0)
        run_all([run], tmp_path, workers=1, imports=(str(file),))
        result = load(run, tmp_path)
        assert result is not None
        assert result["config"]["imports"] == [str(file)]
        assert result["config"]["model"]["routing"]["router"] == "token_choice:bias=true"
    finally:
        del METHODS["of_a_file"]
