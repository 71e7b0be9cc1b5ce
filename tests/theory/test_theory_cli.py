"""`etr theory`: tables, figures, exit codes, errors a person can act on."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from etr.cli.theory import run
from etr.theory import geometric_success
from etr.theory.tables import capacity_of, capacity_rows, check_rows, findings, success_rows

FAST = {"check": ("--samples", "300")}
VERBS = {
    "success": ["paper", "tighter", "0.6574", "vacuous"],
    "capacity": ["wanted", "affinity", "exponential"],
    "crossover": ["1.361", "never behind"],
    "check": ["18 of 18 agree", "silent between"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_prints(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, *FAST.get(verb, ())]) == 0
    out = capsys.readouterr().out
    for word in VERBS[verb]:
        assert word in out


@pytest.mark.parametrize("verb", VERBS)
def test_draws(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "figure.svg"
    assert run([verb, "--figure", str(target), *FAST.get(verb, ())]) == 0
    assert ET.parse(target).getroot().tag.endswith("svg")
    assert [path.name for path in target.parent.iterdir()] == ["figure.svg"]
    assert str(target) in capsys.readouterr().out.replace("\n", "")


def test_the_same_figure_twice(tmp_path: Path) -> None:
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        assert run(["crossover", "--figure", str(path)]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_check_fails_on_disagreement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*arguments, **options):
        return np.minimum(geometric_success(*arguments, **options) + 0.2, 1.0)

    monkeypatch.setattr("etr.theory.tables.geometric_success", wrong)
    assert run(["check", "--samples", "2000"]) == 1
    assert "NO" in capsys.readouterr().out


def test_noisy_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["success", "--noisy", "--capacity-factors", "0.6"]) == 0
    assert "0.5249" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["success", "--figure", "a.png"], "figure='a.png' must end in .svg"),
        (["success", "--num-tokens", "0"], "num_tokens=0"),
        (["crossover", "--num-experts", "-1"], "num_experts=-1"),
        (["success", "--signal", "-1"], "signal=-1"),
        (["crossover", "--capacity-factors", "-1"], "capacity_factor=-1"),
        (["capacity", "--wanted", "1.5"], "wanted=1.5"),
        (["check", "--samples", "0"], "samples=0"),
        (["nonsense"], "nonsense"),
        ([], "success"),
    ],
)
def test_theory_errors(arguments, message, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ValueError, SystemExit)) as refusal:  # ours, or tyro's own
        run(arguments)
    printed = capsys.readouterr()
    assert message in f"{refusal.value}{printed.err}{printed.out}"


def test_rows() -> None:
    assert capacity_of(0.6, 128, 8) == 10
    assert capacity_of(0.001, 128, 8) == 1
    rows = success_rows([0.6], 128, 8, 1.5)
    assert {choice: paper is not None for _, _, choice, _, paper, _ in rows} == {
        "token": True,
        "expert": True,
        "both": False,
    }
    (row,) = capacity_rows([0.75], 128, 8, 1.5)
    assert row == {"token": None, "expert": 11, "both": None}
    rows = check_rows(0.6, 32, 4, [1.0], samples=100, seed=0)
    assert len(rows) == 6


def test_findings_where_no_capacity_is_in_range() -> None:
    stated = dict(findings(64, 8, 1.5))
    assert stated["token choice, lower constant 1/5: stated only for"] == "no C"
