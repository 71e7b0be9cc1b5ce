"""Tell whose folder a folder is, and hold it while writing into it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from etr.files import ASIDE, find_object, put_back, remove_temporaries
from etr.parallel import Ranks
from etr.train.checkpoint_folder import FOLDER
from etr.train.lock import locked

LOCK = ".lock"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
ROW = "row.json"


@contextlib.contextmanager
def writing(folder: Path, ranks: Ranks | None = None) -> Iterator[None]:
    """Hold the folder of a run, comparison or study: no other process writes into it.

    What processes left there that were killed while they wrote is put in order first.

    Args:
        folder: is made where it is not there.
        ranks: all of them call this; None for this process alone.
    Raises:
        ValueError: another process holds it, or it cannot be written to.
    """
    with locked(folder / LOCK, ranks):
        if ranks is None or ranks.is_first:
            _put_in_order(folder)
        yield


@contextlib.contextmanager
def making(folder: Path) -> Iterator[None]:
    """Hold the name of a folder that is to be made: no other process makes it.

    Raises:
        ValueError: another process does, or nothing can be written there.
    """
    folder = folder.resolve()
    with locked(folder.with_name(f".{folder.name}{LOCK}")):
        yield


def refuse_unless_run(folder: Path) -> None:
    """Let a run be written into a new folder, or a run's own, and no other.

    Raises:
        ValueError: it is that of a comparison or a model.
    """
    if (folder / RESULTS).exists() or any(folder.glob(f"*/{METRICS}")):
        raise ValueError(
            f"out={str(folder)!r} holds a comparison, or runs in folders of their own; choose "
            "another folder"
        )
    if (folder / ROW).exists():
        raise ValueError(
            f"out={str(folder)!r} is a finished run of a comparison, which would no longer be "
            "equal work for all; choose another folder"
        )
    _refuse_model(folder)


def refuse_unless_comparison(folder: Path) -> None:
    """Let a comparison be written into a new folder, or a comparison's own, and no other.

    Raises:
        ValueError: it is that of a run or a model.
    """
    _refuse_model(folder)
    if any((folder / name).exists() for name in (FOLDER, METRICS, CONFIG)):
        raise ValueError(
            f"out={str(folder)!r} already holds a run of `etr train`; choose another folder"
        )


def _refuse_model(folder: Path) -> None:
    if "model_type" in (find_object(folder / CONFIG) or {}) or any(folder.glob("*.safetensors")):
        raise ValueError(f"out={str(folder)!r} holds a model; choose another folder")


def _put_in_order(folder: Path) -> None:
    names = "|".join(name.replace(".", r"\.") for name in (CONFIG, METRICS, RESULTS, ROW))
    remove_temporaries(folder, name=names)
    remove_temporaries(folder / FOLDER)
    for path in (folder / FOLDER).glob(f"{ASIDE}*"):
        put_back(path.with_name(path.name.removeprefix(ASIDE)))


def has_metrics(run: Path) -> bool:
    """Whether a run has written metrics."""
    path = run / METRICS
    return path.is_file() and path.stat().st_size > 0


def set_metrics_aside(run: Path) -> Path:
    """Give a run's metrics a name that is free; returns it."""
    names = (run / f"metrics.{number}.jsonl" for number in count(1))
    kept = next(path for path in names if not path.exists())
    os.replace(run / METRICS, kept)
    return kept
