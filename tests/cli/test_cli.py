"""The command line: each verb on a tiny run, and errors a person can act on."""

from __future__ import annotations

import json
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest

import etr
from etr.cli import VERBS, main
from etr.field_notes import field_notes
from etr.methods import METHODS
from etr.recipes import smoke
from etr.report import FIGURES

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for number in range(60):
        stream = random.Random(number)
        body = " ".join(stream.choice(words) for _ in range(150))
        (folder / f"{number}.txt").write_text(f"{number}: {body}\n")
    return folder


@pytest.fixture(scope="module")
def options(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    return [
        *("--data", str(text), "--cache-dir", str(cache)),
        *("--sequence-length", "32", "--batch-size", "4"),
    ]


@pytest.fixture(scope="module")
def size() -> list[str]:
    return [
        *("--hidden-size", "32", "--num-layers", "1", "--num-heads", "2"),
        *("--num-key-value-heads", "2", "--num-experts", "4", "--expert-size", "16"),
        *("--steps", "6", "--eval-every", "3", "--checkpoint-every", "3"),
        *("--eval-tokens-per-domain", "64", "--warmup-steps", "2", "--device", "cpu"),
    ]


@pytest.fixture(scope="module")
def run(options, size, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run."""
    out = tmp_path_factory.mktemp("runs") / "train"
    assert main(["train", "--out", str(out), *options, *size]) == 0
    return out


def test_train_leaves_a_run(run, capsys):
    assert json.loads((run / "config.json").read_text())["steps"] == 6
    assert (run / "checkpoints" / "step-00000006" / "model.safetensors").exists()


def test_train_again_names_what_to_do(run, options, size, capsys):
    assert main(["train", "--out", str(run), *options, *size]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_generate(run, capsys):
    assert main(["generate", str(run), "--prompt", "one two", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("one two")


def test_generate_greedily_from_nothing_is_repeatable(run, capsys):
    printed = []
    for seed in ("0", "1"):
        arguments = ["--max-new-tokens", "5", "--temperature", "0", "--seed", seed]
        assert main(["generate", str(run), *arguments]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_evaluate_prints_bits_per_byte(run, options, capsys):
    assert main(["evaluate", str(run), *options]) == 0
    out = capsys.readouterr().out
    assert "bits/byte" in out
    assert "threshold selection" in out


def test_calibrate_writes_a_copy(run, options, tmp_path, capsys):
    target = tmp_path / "calibrated"
    arguments = ["--num-batches", "4", "--save-to", str(target)]
    assert main(["calibrate", str(run), *options, *arguments]) == 0
    assert "thresholds keep" in capsys.readouterr().out
    assert main(["evaluate", str(target), *options]) == 0
    assert not list(tmp_path.glob(".tmp*"))


def test_compare_and_report(options, size, tmp_path, monkeypatch, capsys):
    # The demo draws all figures of its runs.
    monkeypatch.setattr("etr.report.figures.FIGURES", FIGURES[:3])
    out = tmp_path / "compare"
    arguments = ["--variants", "baseline", "etr", "--out", str(out), *options, *size]
    assert main(["compare", *arguments]) == 0
    assert len(json.loads((out / "results.json").read_text())["rows"]) == 2
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").exists()
    assert "report:" in capsys.readouterr().out


@pytest.mark.parametrize("full", [False, True])
def test_demo_ends_with_table_report_and_sample(full, text, tmp_path, monkeypatch, capsys):
    import etr.cli.demo

    small = smoke(str(tmp_path / "demo"))
    data = replace(small.run.data, data=(str(text),), cache_dir=str(tmp_path / "cache"))
    small = replace(small, run=replace(small.run, data=data))
    recipe = "demo" if full else "quick_demo"
    monkeypatch.setattr(etr.cli.demo, recipe, lambda out, seeds: replace(small, seeds=seeds))
    page = tmp_path / "docs" / "demo.md"
    arguments = ["--out", str(tmp_path / "demo"), "--markdown", str(page), "--prompt", "one"]
    assert main(["demo", *(["--full"] if full else []), *arguments]) == 0
    out = capsys.readouterr().out
    assert "MaxVio" in out
    assert str(tmp_path / "demo" / "report.html") in out
    assert "ETR continues 'one':" in out
    assert "no curves" not in page.read_text()
    assert ("etr demo --full\n" if full else "etr demo\n") in page.read_text()
    assert ("It cannot say which router" in out) == (not full)


def test_the_demo_has_its_folders_apart(monkeypatch):
    import etr.cli.demo

    found = []
    for recipe in ("demo", "quick_demo"):
        monkeypatch.setattr(etr.cli.demo, recipe, lambda out, seeds: found.append((out, seeds)))
    monkeypatch.setattr(etr.cli.demo, "run_comparison", lambda *arguments: None)
    assert main(["demo"]) == 130
    assert main(["demo", "--full", "--seeds", "0", "1"]) == 130
    assert found == [("runs/demo", (0,)), ("runs/demo-full", (0, 1))]


def test_methods_lists_every_row_within_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for name in (*METHODS, *etr.ROUTERS, *etr.CAPACITIES):
        assert name in out


def test_methods_has_its_old_name_too(capsys):
    printed = []
    for verb in ("methods", "routers"):
        assert main([verb]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


@pytest.mark.parametrize("name", METHODS)
def test_methods_shows_a_card(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["methods", name]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    card, words = METHODS[name], " ".join(out.split())
    for said in (card.title, card.summary, card.claim, card.departs, card.paper):
        assert said in words
    for option, value in card.options.items():
        assert f"--{option.replace('_', '-')} {value}" in words


@pytest.mark.parametrize("name", [*etr.ROUTERS, *etr.CAPACITIES])
def test_methods_shows_options(name, capsys):
    assert main(["methods", name]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert name in out
    for kind in (etr.ROUTERS.get(name), etr.CAPACITIES.get(name)):
        for field in () if kind is None else fields(kind):
            assert f"{field.name} = " in out
            assert field_notes(kind)[field.name]


def test_help_lists_verbs(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dance"], "no verb 'dance'"),
        (["generate", "no/such/folder", "--decoding", "dance"], "decoding='dance' is unknown"),
        (["evaluate", "no/such/folder", "--objective", "dance"], "objective='dance' is unknown"),
        (["transform", "dance", "a", "b"], "transform='dance' is unknown"),
        (["transform", "renumber", "no/such/folder", "b"], "is not a folder"),
        (["generate", "no/such/folder"], "is not a folder"),
        (["methods", "nonsense"], "name='nonsense' is unknown"),
        (["train", "--router", "nonsense"], "router='nonsense' is unknown"),
        (["train", "--top-k", "9", "--router", "token_choice"], "top_k=9 exceeds num_experts=8"),
        (["train", "--data", "no/such/file.txt"], "no/such/file.txt"),
        (["compare", "--variants", "etr", "etr"], "different names"),
    ],
)
def test_errors_are_sentences(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as end:  # tyro's own refusal
        code = end.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err + captured.out
    assert "Traceback" not in captured.err


def test_generate_refuses_a_folder_without_model(tmp_path, capsys):
    assert main(["generate", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
