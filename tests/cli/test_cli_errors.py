"""What a person can act on is one line and an exit code, whatever kind of error it is."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from safetensors import SafetensorError

from etr.cli import _options, main
from etr.cli._errors import describe
from etr.cli._tables import make_table
from etr.train import TrainConfig, TrainingDiverged

ERRORS = [
    (ValueError("bad\nvalue"), 2, "bad value"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "invalid start byte"),
    (json.JSONDecodeError("Expecting value", "{", 1), 2, "Expecting value"),
    (FileNotFoundError(2, "No such file or directory", "there"), 2, "there: No such file"),
    (PermissionError(30, "Read-only file system", "out"), 2, "out: Read-only file system"),
    (OSError(28, "No space left on device", "big"), 2, "big: No space left on device"),
    (OSError(36, "File name too long", "x" * 300), 2, "File name too long"),
    (NotADirectoryError(20, "Not a directory", "file/out"), 2, "file/out: Not a directory"),
    (OSError("without a number"), 2, "without a number"),
    (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
    (MemoryError(), 2, "out of memory"),
    (TrainingDiverged("loss is nan at step 3"), 2, "loss is nan at step 3"),
    (SafetensorError("header too large"), 2, "header too large"),
    (StrictDataclassError("hidden_size is of type str"), 2, "hidden_size is of type str"),
    (zipfile.BadZipFile("not a zip file"), 2, "not a zip file"),
    (torch.OutOfMemoryError("no memory on the device"), 2, "no memory on the device"),
    (ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval"), 2, "package lm_eval"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A verb that raises what it is given."""

    def fail_with(error: BaseException) -> None:
        def run(arguments: list[str]) -> int:
            raise error

        real = importlib.import_module
        module = SimpleNamespace(run=run)
        monkeypatch.setattr(
            importlib,
            "import_module",
            lambda name, *rest: module if name == "etr.cli.methods" else real(name, *rest),
        )

    return fail_with


@pytest.mark.parametrize(("error", "code", "text"), ERRORS, ids=lambda x: type(x).__name__)
def test_kinds_of_error(failing: Any, capsys: Any, error: Any, code: int, text: str) -> None:
    failing(error)
    assert main(["methods"]) == code
    said = capsys.readouterr().err
    assert said.startswith("etr methods: ")
    assert text in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyError("ours"), TypeError("ours")])
def test_faults_of_the_program_show_where(failing: Any, error: Exception) -> None:
    failing(error)
    with pytest.raises(type(error), match="ours"):
        main(["methods"])


def test_an_interrupt_while_a_verb_is_imported(monkeypatch: Any, capsys: Any) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "etr methods: interrupted\n"


def test_an_error_names_both_files_of_a_move() -> None:
    assert describe(OSError(18, "Invalid cross-device link", "a", None, "b")).startswith("a -> b: ")


@pytest.mark.parametrize("verb", [["routers"], ["--help"]])
def test_a_closed_pipe_ends_without_a_word(verb: list[str]) -> None:
    command = [sys.executable, "-m", "etr", *verb]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "COLUMNS": "80"}
    )
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    said = child.stderr.read().decode()
    assert child.wait(60) == 1
    assert said == ""


@pytest.mark.parametrize("arguments", [["help"], ["-h"], ["--help"], []])
def test_help(arguments: list[str], capsys: Any) -> None:
    assert main(arguments) == 0
    assert "usage: etr VERB" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_version(flag: str, capsys: Any) -> None:
    assert main([flag]) == 0
    assert re.fullmatch(r"etr \d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "--lr", "0.1"], "there is no option --lr; use --learning-rate"),
        (["train", "--lr=0.1"], "there is no option --lr; use --learning-rate"),
        (["train", "--capacity-factor", "2"], "use --capacity factor:capacity_factor=NUMBER"),
        (["train", "--output_dir", "x"], "there is no option --output-dir; use --out"),
        (["train", "--device", "cuda:77"], "device='cuda:77' is not on this machine"),
        (["train", "--device", "tpux"], "device='tpux' is not on this machine"),
        (["train", "--device", "meta"], "device='meta' is not on this machine"),
        (["train", "--data", "https://example.org/x.txt"], "nothing is read from a network"),
        (["train", "--router", "etr:gate=x"], "gate='x' must be one of softmax, sigmoid"),
        (["train", "--capacity", "factor:capacity_factor=abc"], "capacity_factor='abc' must be a"),
        (["train", "--capacity", "factor:capacity_factor=NaN"], "capacity_factor=nan must be"),
        (["compare", "--variants", "etr", "etr:x=1", "baseline"], "variant 'etr:x=1': router"),
        (["compare", "--variants", "etr", "b=nope"], "variant 'b=nope': router='nope'"),
    ],
)
def test_usage(arguments: list[str], text: str, tmp_path: Path, capsys: Any) -> None:
    if "--output_dir" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    try:
        code = main(arguments)
    except SystemExit as stopped:  # the parser of options says it in a box
        code = stopped.code
    assert code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert text in said
    assert "Traceback" not in said


def test_every_suggestion_is_an_option_of_some_verb() -> None:
    from etr.cli.generate import GenerateConfig

    options = _options._names(TrainConfig) | _options._names(GenerateConfig)
    for usual, ours in _options.USUAL.items():
        assert ours.split()[0].removeprefix("--") in options, usual
        assert usual not in options


def test_tasks_are_checked_before_models_are_read(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("lm_eval")
    # With tasks of a folder alone, since indexing the harness's own takes long.
    options = ["--tasks", "no_such_task", "--task-path", str(tmp_path)]
    assert main(["evaluate", str(tmp_path / "no-model"), *options]) == 2
    assert "no_such_task is neither a task" in capsys.readouterr().err


def test_numbers_are_whole_in_a_narrow_terminal() -> None:
    table = make_table("task", "a" * 60, "b" * 60, "n", words=("task",))
    numbers = ["0.123 ± 0.456", "0.789 ± 0.012", "1234567"]
    table.add_row("a-name-of-a-task-that-takes-more-than-the-whole-width-of-it" * 2, *numbers)
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    text = console.export_text()
    assert all(number in text for number in numbers)
    assert max(map(len, text.splitlines())) <= 80
