"""What ``--help`` and ``--help-all`` of every verb show."""

from __future__ import annotations

import re
import shlex

import pytest

from etr.cli import VERBS, main
from etr.cli._short_help import HELP

MOST = 12
"""Options in a short help."""
PARTS = [name for name in HELP if name not in VERBS]


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        raise SystemExit(main([*arguments]))
    assert end.value.code == 0
    return capsys.readouterr().out


def options(text: str) -> set[str]:
    """Options that have a line in a help; the negative of a flag is on the line of the flag."""
    lines = text.partition("usage: ")[2].splitlines()[1:]
    return {found[1] for line in lines if (found := re.match(r"\W{1,3}(--\w[\w-]*)", line))}


@pytest.mark.parametrize("name", [*VERBS, *PARTS])
def test_help_is_an_example_and_the_main_options(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    short, full = (shown(capsys, *name.split(), asked) for asked in ("--help", "--help-all"))
    example = HELP[name].example
    assert short.splitlines()[0] == f"Example: {example}"
    assert f"etr {name}" in example
    assert max(map(len, short.partition("usage: ")[0].splitlines())) <= 100
    assert len(options(short)) <= MOST
    assert options(short) <= options(full)
    assert ("--help-all" in short) == (options(short) < options(full))
    if name not in ("cluster", "theory"):
        words = shlex.split(example.partition(" -- ")[0])
        named = {word for word in words if word.startswith("--")} - {
            "--nproc-per-node",
            *name.split(),
        }
        assert named <= options(full)


@pytest.mark.parametrize("name", [*VERBS, *PARTS])
def test_positionals_are_called_by_their_names(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, *name.split(), "--help")
    assert "STR" not in text.partition("positional arguments")[2].partition(" options ")[0]
    if name in ("convert", "export", "transform", "upcycle"):
        assert "SRC DST" in text.partition("usage: ")[2].splitlines()[0]


def test_every_verb_has_an_example() -> None:
    assert set(VERBS) <= set(HELP)


def test_the_first_screen_of_train_says_how_to_choose_a_router(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(capsys, "train", "--help")
    assert len(options(text)) == 10
    first = "\n".join(text.splitlines()[:24])
    for said in ("Which router?", "--router etr ", "--router baseline", "etr methods"):
        assert said in first


def test_defaults_are_those_of_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """A nested config may have another default than its class."""
    text = " ".join(shown(capsys, "compare", "--help").split())
    assert "runs/compare" in text
    assert "runs/train" not in text


def test_compare_shows_its_presets(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "compare", "--help")
    assert "--preset" in options(text)
    assert "rivals" in text.partition("--preset")[2]
    assert options(shown(capsys, "compare", "--preset=rivals", "--help")) == {
        *("--import", "--out", "--smoke", "--workers"),
    }
