"""Verbs on a run: damaged checkpoints, options and text of the run, and what goes on from it."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from etr.cli import main
from etr.cli._of_run import command_line
from etr.parallel import Ranks, manifest
from etr.train import loop
from etr.train.checkpoint import list_checkpoints
from etr.train.checkpoint_folder import find_damage
from etr.train.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

SIZE = (
    "--hidden-size 16 --num-layers 1 --num-heads 2 --num-key-value-heads 2 --num-experts 4 "
    "--expert-size 16 --sequence-length 32 --batch-size 4 --steps 6 --eval-every 6 "
    "--checkpoint-every 3 --eval-tokens-per-domain 64 --warmup-steps 2 --device cpu "
    "--no-diagnostics --profile-every None --cache-dir cache --router etr"
)
VERBS = {
    "generate": "generate {model} --max-new-tokens 2",
    "evaluate": "evaluate {model} --max-tokens-per-domain 64",
    "calibrate": "calibrate {model} --num-batches 1",
    "calibrate to": "calibrate {model} --num-batches 1 --save-to new",
    "trace": "trace {model} --max-tokens 64",
    "export": "export {model} new --num-batches 1",
    "convert": "convert {model} new",
    "transform": "transform renumber {model} new",
    "finetune": "finetune {model} --recover --out new",
    "sft": "sft {model} --data talks.jsonl --out new",
    "consolidate": "consolidate {model} new",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two texts and the folder `runs/a run` of a run on the first."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("letters", "digits"):
        (folder / name).mkdir()
        words = "abcdefgh" if name == "letters" else "12345678"
        for number in range(40):
            stream = random.Random(number)
            text = " ".join(stream.choice(words) * 3 for _ in range(150))
            (folder / name / f"{number}.txt").write_text(f"{number}: {text}\n")
    (folder / "talks.jsonl").write_text('{"prompt": "1", "completion": "2"}\n' * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--out", "runs/a run", "--data", "letters", *SIZE.split()]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in the current folder."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return Path("runs/a run")


def etr(command: str, **names: object) -> int:
    return main([word.format(**names) for word in shlex.split(command)])


def newest(run: Path) -> Path:
    return list_checkpoints(run)[-1]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("part", ["run", "checkpoint"])
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_takes_a_flipped_bit(
    run: Path, verb: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = newest(run)
    flip(checkpoint / "model.safetensors")
    before = (checkpoint / "model.safetensors").read_bytes()
    assert etr(VERBS[verb], model=run if part == "run" else checkpoint) == 2
    error = capsys.readouterr().err
    assert f"checkpoint {checkpoint} is damaged: model.safetensors has another checksum" in error
    assert ("the one before is whole" in error) == (part == "run")
    assert not Path("new").exists()
    assert (checkpoint / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        *((name, flip, "has another checksum") for name in ("config.json", "tokenizer.json")),
        ("train_state.json", flip, "has another checksum"),
        ("optimizer/*.safetensors", flip, "has another checksum"),
        ("generation_config.json", Path.unlink, "is missing"),
        ("manifest.json", Path.unlink, "manifest.json cannot be read"),
    ],
)
def test_no_file_of_a_checkpoint_may_be_damaged(
    run: Path, file: str, damage: Callable, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(next(newest(run).glob(file)))
    assert etr("generate {run}", run=run) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["model_backup.safetensors", "optimizer/more.safetensors", "adapter_config.json", "x.py"],
)
def test_files_beside_a_checkpoint_are_refused_by_name(
    run: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (newest(run) / name).write_text("{}")
    for verb in VERBS.values():
        assert etr(verb, model=run) == 2
        error = capsys.readouterr().err
        assert f"does not list: {name}; move them away" in error
    (newest(run) / name).unlink()
    (newest(run) / ".DS_Store").touch()
    assert etr(VERBS["trace"], model=newest(run)) == 0
    assert (newest(run) / "trace.parquet").exists()
    assert etr(VERBS["generate"], model=run) == 0


def test_a_plain_model_needs_no_manifest(run: Path) -> None:
    assert etr(VERBS["consolidate"], model=run) == 0
    assert not Path("new/manifest.json").exists()
    assert etr(VERBS["generate"], model="new") == 0
    assert etr("convert new keep") == 2  # its router has no place in a Mixtral
    assert etr("export new plain --num-batches 1 --data letters --cache-dir cache") == 0
    assert not Path("plain/manifest.json").exists()


def test_what_is_made_of_a_checkpoint_has_no_manifest_of_its_files(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the next verb would find it damaged."""
    assert etr("export {run} plain --plain --num-batches 1", run=run) == 0
    assert not Path("plain/manifest.json").exists()
    assert not Path("plain/train_state.json").exists()
    assert "text: letters (of runs/a run)" in capsys.readouterr().out
    assert etr("evaluate plain --data letters --cache-dir cache") == 0


# Calibrating


def thresholds(checkpoint: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(checkpoint / "model.safetensors")
    return {name: value for name, value in tensors.items() if ".calibration." in name}


def test_a_calibrated_run_goes_on_from_its_thresholds(
    run: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    before = thresholds(newest(run))
    names = [path.name for path in list_checkpoints(run)]
    assert etr("calibrate {run} --num-batches 2", run=run) == 0
    assert "text: letters (of runs/a run)" in capsys.readouterr().out
    after = thresholds(newest(run))
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert [path.name for path in list_checkpoints(run)] == names
    assert find_damage(newest(run), Ranks(None)) is None
    assert manifest.unlisted(newest(run)) == []
    seen: list[dict[str, torch.Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:

        def see(trainer: loop.Trainer) -> None:
            restore(trainer)
            state = trainer.model.state_dict()
            seen.append({name: state[name].clone() for name in after})

        restore = loop.Trainer._restore
        patch.setattr(loop.Trainer, "_restore", see)
        assert etr("train --resume --out {run} --steps 7", run=run) == 0
    assert all(torch.equal(seen[0][name], value) for name, value in after.items())
    assert not [str(w.message) for w in recwarn if "damaged" in str(w.message)]
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_a_calibrated_copy_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (newest(run) / "model.safetensors").read_bytes()
    assert etr(VERBS["calibrate to"], model=run) == 0
    assert (newest(run) / "model.safetensors").read_bytes() == before
    assert find_damage(Path("new"), Ranks(None)) is None
    assert etr(VERBS["calibrate to"], model=run) == 2
    assert "save_to='new' exists already" in capsys.readouterr().err
    assert etr(VERBS["generate"], model="new") == 0


def test_a_plain_model_is_calibrated_in_its_place(run: Path) -> None:
    assert etr(VERBS["consolidate"], model=run) == 0
    old = sorted(path.name for path in Path("new").iterdir())
    os.rename("new/model.safetensors", "new/model-00001-of-00001.safetensors")
    weights = load_file("new/model-00001-of-00001.safetensors")
    names = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    Path("new/model.safetensors.index.json").write_text(json.dumps(names))
    assert etr("calibrate new --num-batches 1 --data letters --cache-dir cache") == 0
    assert sorted(path.name for path in Path("new").iterdir()) == old
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith(".")) == []


# Going on


def losses(run: Path) -> list[float]:
    rows = read_metrics(run / "metrics.jsonl")
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_resume_needs_no_options(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = losses(run)
    shutil.rmtree(newest(run))
    config = (run / "config.json").read_text()
    assert etr("train --resume --out {run}", run=run) == 0
    assert losses(run) == whole
    for option in ("resume", "auto_resume"):
        config = config.replace(f'"{option}": true', f'"{option}": false')
    again = json.loads((run / "config.json").read_text())
    assert {**again, "resume": False} == json.loads(config)
    assert "trained 6 steps" in capsys.readouterr().out


def test_auto_resume_takes_the_options_of_the_run_too(run: Path) -> None:
    whole = losses(run)
    shutil.rmtree(newest(run))
    assert etr("train --auto-resume --out {run}", run=run) == 0
    assert losses(run) == whole


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--data digits", "--data is ['letters'] there, not ['digits']"),
        ("--seed 3", "--seed is 0 there, not 3"),
        ("--learning-rate 1", "--learning-rate is 0.003 there, not 1.0"),
        ("--router baseline", "--router is 'etr' there, not 'baseline'"),
        ("--num-experts 8", "--num-experts is 4 there, not 8"),
        ("--batch-size 8", "--batch-size is 4 there, not 8"),
        ("--steps 5", "--steps is 6 there, not 5"),
    ],
)
@pytest.mark.parametrize("way", ["--resume", "--auto-resume"])
def test_what_a_run_learns_from_may_not_change(
    run: Path, option: str, words: str, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert etr(f"train {way} --out {{run}} {option}", run=run) == 2
    assert words in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_only_watches_may_change(run: Path) -> None:
    whole = losses(run)
    shutil.rmtree(newest(run))
    command = "train --resume --out {run} --eval-every 2 --checkpoint-every 2 --keep-checkpoints 1"
    assert etr(command, run=run) == 0
    assert losses(run) == whole
    assert [path.name for path in list_checkpoints(run)] == ["step-00000006"]
    config = json.loads((run / "config.json").read_text())
    assert (config["eval_every"], config["checkpoint_every"]) == (2, 2)


def test_more_steps_go_on_as_a_longer_run_would_from_there(run: Path) -> None:
    """From step 7 on, learning rate and capacity are those of a run of 9 steps."""
    assert etr("train --resume --out {run} --steps 9", run=run) == 0
    assert etr(f"train --out long --data letters {SIZE} --steps 9") == 0
    one, other = (
        {row["step"]: row for row in read_metrics(path / "metrics.jsonl") if "loss" in row}
        for path in (run, Path("long"))
    )
    assert list(one) == list(range(1, 10))
    for step in (7, 8, 9):
        for name in ("learning_rate", "capacity_mean"):
            assert one[step][name] == other[step][name]
    assert one[6]["learning_rate"] != other[6]["learning_rate"]
    assert json.loads((run / "config.json").read_text())["steps"] == 9


def test_the_hint_after_an_interrupt_is_the_whole_command(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = losses(run)
    shutil.rmtree(run)
    step = loop.Trainer.train_step

    def interrupted(trainer: loop.Trainer) -> list:
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", interrupted)
        patch.setattr("etr.cli._of_run.shutil.which", lambda name: f"bin/{name}")
        assert main(["train", "--out", str(run), "--data", "letters", *SIZE.split()]) == 130
    said, command = capsys.readouterr().out.splitlines()[-2:]
    assert said == "stopped after step 4; go on with:"
    assert command == "etr train --resume --out 'runs/a run'"
    assert main(shlex.split(command)[1:]) == 0
    assert losses(run) == whole


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ({}, "etr train --out 'a b'"),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"},
            "torchrun --nproc-per-node 4 -m etr train --out 'a b'",
        ),
    ],
)
def test_a_command_names_its_launcher(
    variables: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("etr.cli._of_run.shutil.which", lambda name: f"bin/{name}")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert command_line("train", ["--out", "a b"]) == command


def test_a_damaged_config_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_text('{"steps": "six"}')
    assert etr("train --resume --out {run}", run=run) == 2
    assert "config.json is not the config of a run: steps='six'" in capsys.readouterr().err
    assert etr(VERBS["evaluate"], model=run) == 2
    assert "config.json is not the config of a run" in capsys.readouterr().err
    assert etr(f"{VERBS['evaluate']} --data letters --cache-dir cache", model=run) == 0
    assert etr(VERBS["generate"], model=run) == 0


# The text of a run


@pytest.mark.parametrize("verb", ["evaluate", "calibrate to", "trace", "export"])
@pytest.mark.parametrize("part", ["run", "checkpoint"])
def test_verbs_read_the_text_of_the_run_and_say_so(
    run: Path, verb: str, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run if part == "run" else newest(run)
    assert etr(VERBS[verb], model=model) == 0
    assert "text: letters (of " in capsys.readouterr().out
    shutil.rmtree("new", ignore_errors=True)
    assert etr(f"{VERBS[verb]} --data digits", model=model) == 0
    assert "text: digits\n" in capsys.readouterr().out


def test_generate_says_which_checkpoint_it_is(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert etr(VERBS["generate"], model=run) == 0
    assert f"{newest(run)}, trained on letters" in capsys.readouterr().err


def test_runs_with_different_text_need_one_to_be_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", "other", "--data", "digits", *SIZE.split()]) == 0
    assert etr("evaluate {run} other", run=run) == 2
    assert "different text (runs/a run: letters; other: digits): name --data" in (
        capsys.readouterr().err
    )
    assert etr("evaluate {run} other --data digits", run=run) == 0
    assert etr("evaluate {run} {run}", run=run) == 0
