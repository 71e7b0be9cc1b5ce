"""Processes that are killed at each operation on files while they write a checkpoint.

A fork of the trainer writes into a copy of its run's folder, and SIGKILL meets it before the first
operation on files, before the second, and so on until one fork gets through.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etr.data import DataConfig, OpenedData, open_data
from etr.parallel import Ranks
from etr.train import ModelConfig, RoutingOptions, TrainConfig, train
from etr.train.checkpoint import list_checkpoints, rewrite_model
from etr.train.checkpoint_folder import find_damage
from etr.train.loop import Trainer
from etr.train.metrics import read_metrics

STEPS, SAVED, NOW = 6, 2, 4
"""Steps of the run, of its whole checkpoint, and of the one whose writer is killed."""
OPERATIONS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"})
WORDS = "the cat sat on a mat and saw red dogs run home"
WAYS = ("a new checkpoint, one kept", "over a damaged one", "a calibrated one in its place")


@dataclass(frozen=True, kw_only=True)
class Kills:
    """What became of the runs whose writer was killed.

    Args:
        way: what was being written.
        number: of kills, each at another operation.
        resumed: runs that went on from a whole checkpoint.
        equal: of these, runs with the losses of one that nothing disturbed.
        left: files and folders of the killed that were still there at the end.
    """

    way: str
    number: int
    resumed: int
    equal: int
    left: int


def write_corpus(folder: Path) -> Path:
    """Two domains of a few words."""
    for domain in ("one", "two"):
        (folder / domain).mkdir(parents=True)
        for number in range(40):
            text = f"{number} {WORDS} {domain} " * 12
            (folder / domain / f"{number}.txt").write_text(text)
    return folder


def tiny_run(folder: Path, corpus: Path) -> TrainConfig:
    """A run in `folder`, which is the current one whenever it trains."""
    routing = RoutingOptions(num_experts=4, expert_size=16)
    return TrainConfig(
        out="run",
        data=DataConfig(
            data=(str(corpus),), sequence_length=16, batch_size=4, cache_dir=str(folder / "cache")
        ),
        model=ModelConfig(
            hidden_size=16, num_layers=1, num_heads=2, num_key_value_heads=2, routing=routing
        ),
        steps=STEPS,
        eval_every=STEPS,
        eval_tokens_per_domain=64,
        checkpoint_every=SAVED,
        keep_checkpoints=1,
        device="cpu",
        diagnostics=False,
        profile_every=None,
    )


def kill_at_every_operation(
    folder: Path, corpus: Path, way: str, operations: frozenset[str] = OPERATIONS
) -> Kills:
    """Try one way of writing a checkpoint.

    Args:
        folder: new.
        corpus: text.
        way: of `WAYS`.
        operations: those at which writers are killed, as Python's audit events call them.
    """
    folder.mkdir(parents=True)
    config = tiny_run(folder, corpus)
    data = open_data(config.data)
    with inside(folder / "whole"):
        train(config, data=data)
        whole = losses()
    outcomes: list[tuple[bool, bool, int]] = []
    with inside(folder / "base"):
        trainer, write = _before(way, config, data)
    with trainer:
        for number in range(1, 1000):
            place = folder / str(number)
            shutil.copytree(folder / "base", place)
            with inside(place):
                if not _killed(write, number, operations):
                    break
                outcomes.append(_go_on(config, data, whole))
            shutil.rmtree(place)
    return Kills(
        way=way,
        number=len(outcomes),
        resumed=sum(resumed for resumed, _, _ in outcomes),
        equal=sum(equal for _, equal, _ in outcomes),
        left=sum(left for _, _, left in outcomes),
    )


def _before(way: str, config: TrainConfig, data: OpenedData) -> tuple[Trainer, Callable[[], None]]:
    """A trainer that stands where the checkpoint is due, and what writes it."""
    trainer = Trainer(config, data)
    while trainer.step < SAVED:
        trainer.advance()
    trainer.saver.wait()
    if way == WAYS[2]:
        return trainer, lambda: _rewrite(trainer)
    while trainer.step < NOW:
        trainer.train_step()
    if way == WAYS[1]:
        (saved,) = list_checkpoints(Path("run"))
        damaged = saved.with_name(saved.name.replace(str(SAVED), str(NOW)))
        shutil.copytree(saved, damaged)
    return trainer, trainer.save


def _rewrite(trainer: Trainer) -> None:
    (saved,) = list_checkpoints(Path("run"))
    rewrite_model(saved, saved, trainer.model)


def _killed(write: Callable[[], None], number: int, operations: frozenset[str]) -> bool:
    """Whether a fork that is killed at this operation dies of it, and does not get through."""
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            _die_at(number, operations)
            write()
            os._exit(0)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a writer ended with {status} and not by a kill")
    return status != 0


def _die_at(number: int, operations: frozenset[str]) -> None:
    """Let SIGKILL meet this process before an operation on files that changes something."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in operations or (event == "open" and _only_reads(arguments)):
            return
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _only_reads(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 else 0
    return not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)


def _go_on(config: TrainConfig, data: OpenedData, whole: list[float]) -> tuple[bool, bool, int]:
    """Whether the run goes on, ends as `whole`, and what is left of the killed writer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            train(dataclasses.replace(config, resume=True), data=data)
        except ValueError:
            return False, False, 0
    names = [path.name for path in (Path("run") / "checkpoints").iterdir()]
    intact = find_damage(list_checkpoints(Path("run"))[-1], Ranks(None)) is None
    return intact, losses() == whole, len(names) - 1


def losses() -> list[float]:
    """Losses of the run in the current folder."""
    rows = read_metrics(Path("run") / "metrics.jsonl")
    return [row["loss"] for row in rows if row["kind"] == "train"]


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """With a folder as the current one; it is made."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(folder):
        yield
