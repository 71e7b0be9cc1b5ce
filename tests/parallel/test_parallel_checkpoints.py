"""Checkpoints of one process that go wrong: damaged files, a full disk, writing in background."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from parallel_runs import tiny_config, write_corpus
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystem

from etr.data import OpenedData, open_data
from etr.hf import EtrForCausalLM
from etr.parallel import LoadPlanner, Ranks, manifest
from etr.train import TrainConfig, checkpoint, train
from etr.train.checkpoint import list_checkpoints
from etr.train.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> OpenedData:
    return open_data(tiny_config(folder, "any").data)


def losses(config: TrainConfig) -> list[float]:
    rows = read_metrics(Path(config.out) / "metrics.jsonl")
    return [row["loss"] for row in rows if row["kind"] == "train"]


def names(config: TrainConfig) -> list[str]:
    return sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(folder: Path, data: OpenedData) -> list[float]:
    """Losses of a run that nothing disturbs."""
    config = tiny_config(folder, "whole", checkpoint_every=2)
    train(config, data=data)
    return losses(config)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def holding(text: str) -> Callable[[Path], None]:
    """Write this in the place of a file."""

    def damage(path: Path) -> None:
        path.write_text(text)

    return damage


def listing(**changes: Any) -> Callable[[Path], None]:
    """Change entries of a manifest; None takes one out."""

    def damage(path: Path) -> None:
        files = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: e for name, e in files.items() if e is not None}))

    return damage


def stating(**changes: Any) -> Callable[[Path], None]:
    """Change the state, and the manifest with it, as another program might."""

    def damage(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        files = manifest.describe_files(path.parent, Ranks(None))
        (path.parent / manifest.NAME).write_text(json.dumps(files))

    return damage


NO_LIST = "manifest.json is not a list of files"
ENTRY = {"bytes": 1, "sha256": "0"}


def no_optimizer(path: Path) -> None:
    files = json.loads(path.read_text())
    path.write_text(json.dumps({name: e for name, e in files.items() if "/" not in name}))


@pytest.fixture(scope="module")
def short(folder: Path, data: OpenedData) -> Path:
    """A run of 4 steps with a checkpoint at 2 and at 4."""
    config = tiny_config(folder, "short", steps=4, checkpoint_every=2)
    train(config, data=data)
    return Path(config.out)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("model.safetensors", shorten, r"model.safetensors has \d+ of \d+ bytes"),
        ("model.safetensors", flip, "model.safetensors has another checksum"),
        ("optimizer/*", flip, "another checksum"),
        ("optimizer/*", Path.unlink, "is missing"),
        ("train_state.json", shorten, "train_state.json"),
        ("train_state.json", Path.unlink, "train_state.json is missing"),
        ("tokenizer.json", Path.unlink, "tokenizer.json is missing"),
        ("config.json", Path.unlink, "config.json is missing"),
        ("manifest.json", Path.unlink, "manifest.json cannot be read"),
        ("manifest.json", holding('{"config'), "manifest.json cannot be read"),
        *(
            ("manifest.json", holding(text), NO_LIST)
            for text in ("{}", "[]", "null", "7", '{"a": 1}', '{"a": {}}', '["config.json"]')
        ),
        *(
            ("manifest.json", listing(**{name: ENTRY}), NO_LIST)
            for name in ("../a", "/a", "a/../../b", "")
        ),
        ("manifest.json", listing(a={**ENTRY, "bytes": "1"}), NO_LIST),
        ("manifest.json", listing(a=ENTRY), "a is missing"),
        *(
            ("manifest.json", listing(**{name: None}), f"manifest.json lists no .*{name}")
            for name in ("train_state.json", "config.json", "tokenizer_config.json")
        ),
        ("manifest.json", listing(**{"model.safetensors": None}), r"lists no model\*.safetensors"),
        ("manifest.json", no_optimizer, r"lists no optimizer/\*.safetensors"),
        ("train_state.json", stating(step=3), "train_state.json is of step 3"),
        ("train_state.json", stating(step="4"), "train_state.json has counters"),
        ("train_state.json", stating(tokens=-1), "train_state.json has counters"),
        ("train_state.json", stating(loader=[]), "train_state.json cannot be used"),
        ("train_state.json", stating(fingerprint=None), "train_state.json cannot be used"),
        ("train_state.json", stating(elapsed_seconds=None), "train_state.json has sums"),
        ("train_state.json", stating(format="2"), "train_state.json has counters"),
        ("train_state.json", stating(more=1), "train_state.json cannot be used"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    folder: Path, data: OpenedData, short: Path, tmp_path: Path, file: str, damage: Any, words: str
) -> None:
    config = tiny_config(folder, "short", steps=4, checkpoint_every=2, out=str(tmp_path / "run"))
    shutil.copytree(short, tmp_path / "run")
    newest = list_checkpoints(Path(config.out))[-1]
    damage(next(newest.glob(file)))
    # The cosine knows its end: what the steps in between learned is that of the shorter run.
    before = losses(config)
    with pytest.warns(UserWarning, match=words):
        train(dataclasses.replace(config, resume=True), data=data)
    assert losses(config) == before
    assert names(config) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("place", ["model_backup.safetensors", "optimizer/more.safetensors"])
@pytest.mark.parametrize("damaged", [False, True])
def test_files_that_no_manifest_lists_are_not_read(
    folder: Path, data: OpenedData, short: Path, tmp_path: Path, place: str, damaged: bool
) -> None:
    """Other weights of the same names, or no weights at all."""
    config = tiny_config(folder, "short", steps=6, checkpoint_every=2, out=str(tmp_path / "run"))
    shutil.copytree(short, tmp_path / "run")
    before, newest = list_checkpoints(Path(config.out))
    train(dataclasses.replace(config, resume=True), data=data)
    expected = losses(config)
    shutil.rmtree(config.out)
    shutil.copytree(short, tmp_path / "run")
    other = next((before / place).parent.glob("*.safetensors"))
    (newest / place).write_bytes(b"no weights" if damaged else other.read_bytes())
    with pytest.warns(UserWarning, match=f"does not list; they are not read: {place}"):
        train(dataclasses.replace(config, resume=True), data=data)
    assert losses(config) == expected


def test_a_run_with_nothing_whole_is_refused(folder: Path, data: OpenedData) -> None:
    config = tiny_config(folder, "nothing", steps=1)
    train(config, data=data)
    shorten(list_checkpoints(Path(config.out))[-1] / "model.safetensors")
    with (
        pytest.raises(ValueError, match=r"every checkpoint of .* is damaged"),
        pytest.warns(UserWarning, match="is damaged"),
    ):
        train(dataclasses.replace(config, auto_resume=True), data=data)


def test_auto_resume_starts_or_goes_on(folder: Path, data: OpenedData, whole: list[float]) -> None:
    config = tiny_config(folder, "auto", checkpoint_every=2, auto_resume=True)
    train(config, data=data)
    assert losses(config) == whole
    train(config, data=data)
    assert losses(config) == whole


def test_writing_in_the_background_changes_nothing(
    folder: Path, data: OpenedData, whole: list[float]
) -> None:
    """Neither what is learned nor what is saved, though weights move while files are written."""
    config = tiny_config(folder, "aside", checkpoint_every=2, background_checkpoints=True)
    train(config, data=data)
    assert losses(config) == whole
    both = (list_checkpoints(path) for path in (Path(config.out), folder / "whole"))
    for mine, theirs in zip(*both, strict=True):
        files = [path.relative_to(theirs) for path in theirs.rglob("*.safetensors")]
        assert len(files) == 2
        for file in files:
            want = load_file(theirs / file)
            for name, value in load_file(mine / file).items():
                assert torch.equal(value, want[name]), name


WRITES = {
    "first": lambda path: True,
    "weights": lambda path: path.name == "model.safetensors",
    "optimizer": lambda path: path.parent.name == "optimizer",
    "state": lambda path: "train_state" in path.name,
    "manifest": lambda path: "manifest" in path.name,
    "tokenizer": lambda path: "tokenizer" in path.name,
}


@pytest.mark.parametrize(
    ("where", "background"),
    [*((where, False) for where in WRITES), ("optimizer", True), ("manifest", True)],
)
def test_a_full_disk_costs_the_checkpoint_not_the_run(
    folder: Path,
    data: OpenedData,
    whole: list[float],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    background: bool,
) -> None:
    """Every write inside the folder of step 4 fails, one kind of file at a time."""
    config = tiny_config(
        folder, f"full-{where}-{background}", checkpoint_every=2, background_checkpoints=background
    )
    with monkeypatch.context() as patch:
        refuse_writes(patch, lambda p: "tmp-step-00000004" in str(p) and WRITES[where](p))
        with pytest.warns(UserWarning, match=r"no checkpoint of step 4 .*No space left on device"):
            train(config, data=data)
    assert losses(config) == whole
    assert names(config) == ["step-00000002", "step-00000006"]


def refuse_writes(patch: pytest.MonkeyPatch, refused: Any) -> None:
    """No space left for the paths for which `refused` is true."""

    def guard(function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            paths = [Path(a) for a in (*args, *kwargs.values()) if isinstance(a, str | Path)]
            writes = not any(a == "rb" or a == "r" for a in args)
            if writes and any(refused(path) for path in paths):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*args, **kwargs)

        return wrapped

    import transformers.modeling_utils as modeling

    patch.setattr("builtins.open", guard(open))
    patch.setattr(modeling, "safe_save_file", guard(modeling.safe_save_file))
    patch.setattr(Path, "open", guard(Path.open))
    patch.setattr(Path, "write_text", guard(Path.write_text))
    patch.setattr(FileSystem, "create_stream", guard(FileSystem.create_stream))


@pytest.fixture
def small_disk(tmp_path: Path, folder: Path, whole: list[float]) -> Iterator[Path]:
    """A file system with room for one and a half checkpoints, where one may be mounted."""
    files = list_checkpoints(folder / "whole")[0].rglob("*")
    size = sum(path.stat().st_size for path in files)
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(
    folder: Path, data: OpenedData, small_disk: Path, whole: list[float]
) -> None:
    config = tiny_config(folder, "any", checkpoint_every=2, out=str(small_disk / "run"))
    with pytest.warns(UserWarning, match="No space left on device"):
        train(config, data=data)
    assert losses(config) == whole
    assert names(config) == ["step-00000002"]
    EtrForCausalLM.from_pretrained(list_checkpoints(Path(config.out))[0])


def test_other_errors_end_the_run(
    folder: Path, data: OpenedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise TypeError("a bug")

    for background in (False, True):
        config = tiny_config(folder, f"bug-{background}", background_checkpoints=background)
        monkeypatch.setattr(checkpoint, "write_tensors", broken)
        with pytest.raises(TypeError, match="a bug"), warnings.catch_warnings():
            train(config, data=data)


def drop_dimensions(folder: Path) -> int:
    """Write single numbers as earlier versions did: without a dimension. How many there were."""
    count = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        count += sum(x.shape == (1,) for x in tensors.values())
        earlier = {name: x.reshape(()) if x.shape == (1,) else x for name, x in tensors.items()}
        save_file(earlier, path, metadata)
    files = manifest.describe_files(folder, Ranks(None))
    (folder / manifest.NAME).write_text(json.dumps(files))
    return count


def test_a_run_whose_single_numbers_have_no_dimension_goes_on(
    folder: Path, data: OpenedData, whole: list[float]
) -> None:
    config = tiny_config(folder, "earlier", checkpoint_every=2)
    train(config, data=data)
    newest = list_checkpoints(Path(config.out))[-1]
    shutil.rmtree(newest)
    assert drop_dimensions(list_checkpoints(Path(config.out))[-1]) == 2 * 3  # with two moments each
    train(dataclasses.replace(config, resume=True), data=data)
    assert losses(config) == whole


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_planner_reads_single_numbers_without_dimension(tmp_path: Path) -> None:
    """From anybody's checkpoint of torch.distributed.checkpoint; others stay as strict as ever."""
    dcp.save({"temperature": torch.tensor(2.0), "wide": torch.ones(2)}, checkpoint_id=tmp_path)
    tensors = {"temperature": torch.zeros(1), "wide": torch.zeros(2)}
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        dcp.load(tensors, checkpoint_id=tmp_path)
    dcp.load(tensors, checkpoint_id=tmp_path, planner=LoadPlanner())
    assert tensors["temperature"].tolist() == [2.0]
    assert tensors["wide"].tolist() == [1.0, 1.0]
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        dcp.load({"wide": torch.zeros(1)}, checkpoint_id=tmp_path, planner=LoadPlanner())
