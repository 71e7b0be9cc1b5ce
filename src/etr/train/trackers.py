"""TensorBoard, Weights & Biases and Trackio behind one interface, that of accelerate."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

TRACKERS = ("tensorboard", "wandb", "trackio")
"""Names of the trackers, which are also those of their packages and extras."""


class Tracker(Protocol):
    """What accelerate's trackers offer."""

    def start(self) -> None: ...

    def log(self, values: dict[str, Any], step: int | None = None) -> None: ...

    def finish(self) -> None: ...


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse unknown names.

    Raises:
        ValueError: names the unknown one.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"trackers={names}: {name!r} must be one of {', '.join(TRACKERS)}")
    if len(set(names)) != len(names):
        raise ValueError(f"trackers={names} names one twice")


def require_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ValueError: names the missing package and the extra that brings it.
    """
    check_trackers(names)
    for name in names:
        for package in (name, "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"trackers={names}: {name} needs the package {package}, which is not "
                    f"installed; install the extra with: pip install 'etr-moe[{name}]'"
                )


def open_trackers(names: tuple[str, ...], run: Path, after_step: int) -> list[Tracker]:
    """Start trackers; none of them needs the network.

    TensorBoard writes to ``tensorboard`` in the run's folder, Weights & Biases offline to
    ``wandb`` there (`wandb sync` uploads it), Trackio to its own local store.

    Args:
        names: of `TRACKERS`.
        run: folder of the run; its name and its parent's are those of run and project.
        after_step: steps done already, when a run goes on.
    Raises:
        ValueError: one is not installed.
    """
    require_trackers(names)
    if names:
        from accelerate import PartialState

        PartialState()  # accelerate's trackers ask it which process they run in
    trackers = [_build(name, run.resolve(), after_step) for name in names]
    for tracker in trackers:
        tracker.start()
    return trackers


def _build(name: str, run: Path, after_step: int) -> Tracker:
    from accelerate import tracking

    project = run.parent.name or "etr"
    tracker: Tracker
    if name == "tensorboard":
        # Points of steps that are about to be repeated are removed.
        tracker = tracking.TensorBoardTracker(
            name, logging_dir=str(run), purge_step=after_step + 1 if after_step else None
        )
    elif name == "wandb":
        tracker = tracking.WandBTracker(
            project,
            name=run.name,
            dir=str(run),
            mode="offline",
            reinit="create_new",  # variants of a comparison train side by side
            settings={"console": "off", "silent": True, "disable_git": True, "save_code": False},
        )
    else:
        tracker = tracking.TrackioTracker(
            project,
            name=run.name,
            resume="allow" if after_step else "never",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
    return tracker


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row under flat names, e.g. ``train/layer0/capacity``.

    Lists are left out but for the layers, and so are step and kind. An alarm is a 1 under its name.
    """
    prefix = row["kind"]
    if prefix == "alarm":
        return {f"alarm/{row['name']}": 1.0}
    if "selection" in row:
        prefix = f"{prefix}/{row['selection']}"
    values = {name: value for name, value in row.items() if name not in ("kind", "step")}
    for number, layer in enumerate(values.pop("layers", ())):
        values[f"layer{number}"] = layer
    return {f"{prefix}/{name}": value for name, value in _flat(values)}


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            for inner, number in _flat(value):
                yield f"{name}/{inner}", number
        elif type(value) in (int, float) and math.isfinite(value):
            yield name, float(value)
