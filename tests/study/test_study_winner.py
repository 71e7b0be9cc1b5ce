"""The search for a form that is served as it is trained: recipe, rule and page."""

from __future__ import annotations

from pathlib import Path

import pytest

from etr.cli import main
from etr.recipes.winner import BESIDE, FORMS, LAST, SEARCH_SEEDS, SEEDS, smoke, winner
from etr.study.collection import Collection
from etr.study.grid import Block, runs_of
from etr.study.study import Study
from etr.study.summary import RunResult, StudyRow
from etr.study.winner import compared, verdict, wins
from etr.train import parse_variant

OTHERS = tuple(parse_variant(text).name for text in BESIDE)


def test_every_run_has_a_config_and_the_verdict_has_seeds_of_its_own() -> None:
    assert set(LAST) <= set(FORMS)
    assert not set(SEARCH_SEEDS) & set(SEEDS)
    for study in (winner(), winner(last=FORMS[:2]), smoke()):
        for block in study.blocks:
            assert len(set(block.rows)) == len(block.rows)
            for run in runs_of(block, lambda *_: 1.0):
                run.config()
            matched = [b for b in study.blocks if b.match != "steps" and b.task == block.task]
            if block.match == "steps":  # what others are matched to comes before them
                assert all(study.blocks.index(block) < study.blocks.index(b) for b in matched[-1:])


def row(name: str, *losses: float) -> StudyRow:
    results: list[RunResult] = [
        {"run": {"variant": name, "seed": seed}, "final": {"served_loss": loss}}
        for seed, loss in enumerate(losses)
    ]
    return StudyRow(name=name, results=tuple(results))


def measured(**less: float) -> tuple[Collection, Study]:
    """On each task, `form` less both rows beside it, over three seeds."""
    blocks = {}
    for task, value in less.items():
        rows = [row(name, 2.0, 2.1, 2.2) for name in OTHERS]
        rows.append(row("form", 2.0 + value, 2.1001 + value, 2.1999 + value))
        blocks[task] = (task, "expert_flops", tuple(rows))
        blocks[f"search of {task}"] = (task, "expert_flops", tuple(reversed(rows)))
    plan = Study(
        blocks=tuple(Block(name=t, task=t, variants=("etr",), steps=9, seeds=(0,)) for t in less),
        reference="linear-1.1",
    )
    return Collection(blocks=blocks, times={}), plan  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "second", "third", "won"),
    [
        (-0.05, -0.05, -0.05, True),
        (-0.05, -0.05, 0.0, True),
        (-0.05, -0.05, 0.05, False),
        (-0.05, 0.0, 0.0, False),
        (0.0, 0.0, 0.0, False),
    ],
)
def test_a_form_wins_on_two_tasks_and_loses_on_none(
    first: float, second: float, third: float, won: bool
) -> None:
    study, plan = measured(a=first, b=second, c=third)
    found = compared(study, plan, OTHERS)
    assert len(found) == 3 * len(OTHERS)  # the search is not counted
    assert wins(found, "form", OTHERS) == won
    assert verdict(found, OTHERS).startswith("`form`" if won else "No form is lower")


def test_a_row_beside_it_that_is_missing_is_no_win() -> None:
    study, plan = measured(a=-0.05, b=-0.05)
    rows = {name: (task, match, found[1:]) for name, (task, match, found) in study.blocks.items()}
    found = compared(Collection(blocks=rows, times={}), plan, OTHERS)
    assert found
    assert not wins(found, "form", OTHERS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_the_smoke_path_writes_its_page_and_goes_on(tmp_path: Path) -> None:
    command = ["compare", "--preset", "winner", "--smoke", "--out", str(tmp_path)]
    assert main(command) == 0
    page = (tmp_path / "winner.md").read_text(encoding="utf-8")
    assert "Not all of it has been run" not in page
    for heading in ("## Verdict", "## text-x\n", "## search, matched", "less linear-0.6"):
        assert heading in page
    for picture in ("images/winner-text-x.svg", "images/winner-search-matched.svg"):
        assert picture in page
        assert (tmp_path / picture).is_file()
    assert "`etr-0.6-map`" in page
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "winner").rglob("*.json")}
    assert main(command) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "winner").rglob("*.json")}
