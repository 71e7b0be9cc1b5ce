"""The recipe behind docs/results/downstream.md: its stages, its resumption, its page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from etr.cli import VERBS, main
from etr.evaluate import ModelResult, TaskResult, comparison_json
from etr.evaluate.tasks import Score
from etr.recipes import downstream
from etr.recipes.downstream import DownstreamConfig, instructions, sft_words, upcycle_words


def config(folder: Path) -> DownstreamConfig:
    return DownstreamConfig(
        teleqna="secret/TeleQnA.zip", out=str(folder / "out"), page=str(folder / "page.md")
    )


class Commands:
    """Stands for `etr`: writes down what it was asked, and leaves the files behind."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.fail_at: int | None = None

    def __call__(self, words: Sequence[str]) -> None:
        if len(self.asked) == self.fail_at:
            raise RuntimeError("killed")
        self.asked.append(list(words))
        if words[0] == "evaluate":
            name, task = Path(words[1]).name, words[3]
            score = Score(value=len(self.asked) / 100, error=0.01, count=7)
            scores = {"all": {"acc": score}, "a category": {"acc": score}}
            result = TaskResult(
                task=task, label=task, scores=scores, rows={"acc": (score.value, 0)}, digest=task
            )
            model = ModelResult(model=name, folder=words[1], selection="dropless", tasks=[result])
            self._write(words, "--json", comparison_json([model], {}))
            return
        out = words[words.index("--out") + 1] if words[0] == "sft" else words[2]
        self._write(["--to", f"{out}/config.json"], "--to", {})

    @staticmethod
    def _write(words: Sequence[str], option: str, values: object) -> None:
        path = Path(words[words.index(option) + 1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    def save(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(downstream, "save_base", save)
    return Commands()


def test_stages_in_order_and_a_page(commands: Commands, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = downstream.run(config(tmp_path), commands)
    verbs = [words[0] for words in commands.asked]
    assert verbs == ["upcycle"] * 2 + ["evaluate"] * 6 + ["sft"] * 2 + ["evaluate"] * 9
    fine_tuned = [words for words in commands.asked if words[0] == "sft"]
    assert [w for a, b in zip(*fine_tuned, strict=True) for w in (a, b) if a != b] == [
        str(tmp_path / "out/etr"),
        str(tmp_path / "out/token_choice"),
        str(tmp_path / "out/etr-sft"),
        str(tmp_path / "out/token_choice-sft"),
    ], "the routers' fine-tuning differs in nothing else"
    text = path.read_text()
    assert "| task | category | measure | n | dense | etr | token_choice |" in text
    after = "token_choice-sft | etr-sft | etr-sft, dropless | dense |"
    assert f"| task | category | measure | n | {after}" in text
    assert "± 0.0100" in text
    assert "a category" not in text
    for file in (path, path.with_suffix(".json")):
        assert str(tmp_path) not in file.read_text()
        assert "secret" not in file.read_text()
    told = [line for line in text.splitlines() if " against " in line]
    others = [("etr-sft", 4), ("etr-sft, dropless", 1), ("dense", 4)]
    for model, tasks in others:
        begin = f"- {model} against token_choice-sft: "
        assert [line.startswith(begin) for line in told].count(True) == tasks
    assert "- etr against dense: +" in text
    assert len(told) == 9 + 2
    assert downstream.page(json.loads(path.with_suffix(".json").read_text())) == text


def test_a_stopped_run_goes_on(commands: Commands, tmp_path: Path) -> None:
    commands.fail_at = 6
    with pytest.raises(RuntimeError, match="killed"):
        downstream.run(config(tmp_path), commands)
    commands.fail_at = None
    downstream.run(config(tmp_path), commands)
    assert len(commands.asked) == len({tuple(words) for words in commands.asked}) == 19
    downstream.run(config(tmp_path), commands)
    assert len(commands.asked) == 19


def test_a_folder_holds_one_run(commands: Commands, tmp_path: Path) -> None:
    downstream.run(config(tmp_path), commands)
    other = dataclasses.replace(config(tmp_path), teleqna_questions=3)
    with pytest.raises(ValueError, match="holds a run of other sizes"):
        downstream.run(other, commands)


def test_the_loss_is_measured_on_other_functions() -> None:
    trained = {row["completion"] for row in instructions(10_000)}
    others = [row["text"] for row in downstream.other_functions()]
    assert len(others) > 100
    assert not [text for text in others if any(text.endswith(end) for end in trained)]


def test_instructions_are_functions_that_parse() -> None:
    rows = instructions(12)
    assert len(rows) == 12
    for row in rows:
        beginning = row["prompt"].partition("\n")[2]
        assert beginning.startswith("def ")
        compile(f"{beginning}\n{row['completion']}", "f.py", "exec")


@pytest.mark.parametrize("words_of", [upcycle_words, sft_words])
def test_commands_know_their_options(words_of, tmp_path: Path, capsys) -> None:
    """An unknown option would end in SystemExit; a missing folder is an error by name."""
    words = words_of(config(tmp_path), "etr")
    if words[0] not in VERBS:
        pytest.skip(f"there is no verb {words[0]!r}")
    assert main(words) == 2
    assert "out" in capsys.readouterr().err


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="steps=0 must be positive"):
        DownstreamConfig(teleqna="t.zip", steps=0)
