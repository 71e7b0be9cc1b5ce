"""Checkpoints with missing, foreign and damaged files, and processes that write into one run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults_saves import (
    WAYS,
    inside,
    kill_at_every_operation,
    losses,
    tiny_run,
    write_corpus,
)
from etr import sheet
from etr.cli import main
from etr.data import OpenedData, open_data
from etr.train import TrainConfig, train
from etr.train.checkpoint import list_checkpoints
from etr.train.metrics import read_metrics

PATIENCE_SECONDS = 300.0
FOREIGN = {
    "model_backup.safetensors": "model.safetensors",
    "optimizer/old.safetensors": "optimizer/*.safetensors",
    "train_state.json.bak": "train_state.json",
    "adapter_config.json": "config.json",
}
"""Files that do not belong to a checkpoint, and of which file of the one before they are copies."""
VERBS = {
    "generate": "generate run",
    "evaluate": "evaluate run",
    "calibrate": "calibrate run",
    "trace": "trace run",
    "export": "export run new",
    "convert": "convert run new",
    "finetune": "finetune run --recover --out new",
    "sft": "sft run --data talks.jsonl --out new",
    "consolidate": "consolidate run new",
}


@dataclass(frozen=True, kw_only=True)
class Tried:
    """Faults of one kind.

    Args:
        what: was done.
        number: how often.
        right: how often the outcome was `outcome`.
        outcome: what should happen.
    """

    what: str
    number: int
    right: int
    outcome: str


def all_tried(folder: Path) -> list[Tried]:
    """Every kind of fault, in folders below this one, which is new."""
    corpus = write_corpus(folder / "corpus")
    config = dataclasses.replace(tiny_run(folder, corpus), keep_checkpoints=2)
    with inside(folder / "base"):
        data = open_data(config.data)
        train(config, data=data)
        whole = losses()
    goes_on = "the run goes on from a whole checkpoint, its loss curve is equal, bit for bit"
    found = [_two_writers(folder / "writers", config, whole)]
    for what, damage in (
        ("a file of the newest checkpoint is missing: each in turn", Path.unlink),
        ("a bit of a file is flipped: each in turn", _flip),
    ):
        with inside(folder / "base"):
            (*_, newest) = list_checkpoints(Path("run"))
            names = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
        right = sum(
            _resumed(folder, config, data, whole, lambda path, n=name, d=damage: d(path / n))
            for name in names
        )
        found.append(Tried(what=what, number=len(names), right=right, outcome=goes_on))
    right = sum(
        _resumed(folder, config, data, whole, lambda path, n=name: _foreign(path, n))
        for name in FOREIGN
    )
    found.append(
        Tried(
            what="a foreign file lies in it: weights, optimizer, state, adapter",
            number=len(FOREIGN),
            right=right,
            outcome=goes_on,
        )
    )
    for what, damage in (
        ("a bit of the weights is flipped", lambda path: _flip(path / "model.safetensors")),
        ("foreign weights lie beside", lambda path: _foreign(path, "model_backup.safetensors")),
    ):
        right = sum(_refused(folder, command, damage) for command in VERBS.values())
        found.append(
            Tried(
                what=f"{what}, and {', '.join(VERBS)} read them",
                number=len(VERBS),
                right=right,
                outcome="refused in one line that names the file",
            )
        )
    for number, way in enumerate(WAYS):
        kills = kill_at_every_operation(folder / f"kills{number}", corpus, way)
        found.append(
            Tried(
                what=f"kill -9 before each operation on files of a save: {way}",
                number=kills.number,
                right=min(kills.resumed, kills.equal),
                outcome=f"{goes_on}, and nothing of the killed is left",
            )
        )
        assert kills.left == 0
    return found


def table(found: list[Tried]) -> str:
    """The page's table, in Markdown."""
    head = ("what is done", "times", "as it should be", "what should be")
    return sheet.table(head, [(t.what, t.number, t.right, t.outcome) for t in found], "lrrl")


def _two_writers(folder: Path, config: TrainConfig, whole: list[float]) -> Tried:
    """Verbs that write into a run that trains in another process."""
    options = (
        f"--out run --data {config.data.data[0]} --cache-dir {config.data.cache_dir} "
        "--sequence-length 16 --batch-size 4 --hidden-size 16 --num-layers 1 --num-heads 2 "
        "--num-key-value-heads 2 --num-experts 4 --expert-size 16 --checkpoint-every 2 "
        "--device cpu --no-diagnostics --profile-every None --eval-tokens-per-domain 64 --steps"
    )
    long = 400
    second = {
        "train": f"train --auto-resume {options} {long}",
        "train --resume": "train --resume --out run",
        "calibrate": "calibrate run",
        "study": "study --out run --smoke",
    }
    with inside(folder):
        command = [sys.executable, "-m", "etr", "train", *shlex.split(options), str(long)]
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + PATIENCE_SECONDS
            while not list_checkpoints(Path("run")) and time.monotonic() < end:
                time.sleep(0.1)
            said = [_say(command) for command in second.values()]
            alive = first.poll() is None
            first.wait(timeout=PATIENCE_SECONDS)
        finally:
            first.kill()
            first.wait()
        steps = [row["step"] for row in read_metrics(Path("run/metrics.jsonl")) if "loss" in row]
    whole_run = alive and first.returncode == 0 and steps == list(range(1, long + 1))
    right = sum(code == 2 and "locked by process" in words for code, words in said)
    return Tried(
        what=f"a second process writes into a run that trains: {', '.join(second)}",
        number=len(second),
        right=right if whole_run else 0,
        outcome="it is refused by name, and the first one finishes with every step once",
    )


def _resumed(
    folder: Path,
    config: TrainConfig,
    data: OpenedData,
    whole: list[float],
    damage: Callable[[Path], None],
) -> bool:
    """Whether a run goes on to the same losses after damage to its newest checkpoint."""
    with _copied(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        damage(list_checkpoints(Path("run"))[-1])
        train(dataclasses.replace(config, resume=True), data=data)
        return losses() == whole


def _refused(folder: Path, command: str, damage: Callable[[Path], None]) -> bool:
    with _copied(folder):
        damage(list_checkpoints(Path("run"))[-1])
        code, words = _say(command)
        made = [path.name for path in Path().iterdir() if path.name == "new"]
    return code == 2 and not made and ".safetensors" in words and "Traceback" not in words


def _say(command: str) -> tuple[int, str]:
    """Exit code of a verb, and what it says of an error."""
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(io.StringIO()):
        code = main(shlex.split(command))
    return code, shown.getvalue()


@contextlib.contextmanager
def _copied(folder: Path) -> Iterator[None]:
    place = folder / "copy"
    shutil.copytree(folder / "base", place)
    try:
        with inside(place):
            yield
    finally:
        shutil.rmtree(place)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _foreign(checkpoint: Path, name: str) -> None:
    before = list_checkpoints(Path("run"))[0]
    shutil.copyfile(next(before.glob(FOREIGN[name])), checkpoint / name)
