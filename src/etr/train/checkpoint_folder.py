"""Finding checkpoints, and telling whole ones from damaged ones.

A checkpoint is compared with its manifest before anything is read from it, and what the manifest
does not list is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etr.files import ASIDE, read_json
from etr.parallel import Ranks, manifest

FOLDER = "checkpoints"
PREFIX = "step-"
FORMAT = 2
OPTIMIZER = "optimizer"
STATE = "train_state.json"
REQUIRED = (
    (STATE,),
    ("config.json",),
    ("tokenizer_config.json",),
    ("model*.safetensors", "shard-*.safetensors"),
    (f"{OPTIMIZER}/*.safetensors",),
)
"""What a manifest must list: one of each tuple of patterns."""
BESIDE = ("trace.parquet",)
"""Files that a verb puts beside a model and that no loader reads."""


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a run needs beside the model to go on as if it had never stopped."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens seen."""
    expert_flops: float
    """Floating-point operations of the experts so far."""
    elapsed_seconds: float
    """Training time so far."""
    loader: dict[str, Any]
    """State of the token loader."""
    fingerprint: dict[str, Any]
    """Options that must be the same on resuming."""


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; whether they are whole is not looked at."""
    found = []
    for path in (run / FOLDER).glob(f"*{PREFIX}*"):
        place = path.with_name(path.name.removeprefix(ASIDE))
        # Where there is none in its place, whoever wrote another was killed between two renames.
        if step_of(place) >= 0 and path.is_dir() and (path == place or not place.exists()):
            found.append(path)
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done in a checkpoint, by its name; -1 for another name."""
    found = re.fullmatch(rf"(?:{re.escape(ASIDE)})?{PREFIX}(\d+)", checkpoint.name)
    return int(found[1]) if found else -1


def run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint belongs to; None for any other folder."""
    folder = checkpoint.resolve()
    return folder.parent.parent if folder.parent.name == FOLDER else None


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, perhaps a damaged one, and not any model's folder."""
    if any((folder / name).exists() for name in (STATE, OPTIMIZER)):
        return True
    if run_of(folder) is not None and step_of(folder) >= 0:
        return True
    try:
        return bool(manifest.read_manifest(folder))
    except ValueError:
        return False


def is_divided(checkpoint: Path) -> bool:
    """Whether many ranks wrote it, so that no model can be loaded from it as it is."""
    return any(checkpoint.glob("shard-*.safetensors"))


def find_damage(checkpoint: Path, ranks: Ranks) -> str | None:
    """Why nobody can go on from a checkpoint; None where nothing is wrong. All ranks call this.

    Raises:
        ValueError: it is of a format that this version does not read.
    """
    damage = manifest.find_damage(checkpoint, ranks, REQUIRED)
    if damage is None:
        try:
            read_state(checkpoint)
        except UnusableState as error:
            damage = str(error)
        except UnknownFormat as error:
            raise ValueError(str(error)) from None
    return ranks.from_first(damage)


def find_model(path: str | Path) -> Path:
    """The folder to read a model from: a run's newest checkpoint, or the folder itself.

    A checkpoint is compared with its manifest. Any other model's folder is taken as it is.

    Raises:
        FileNotFoundError: no such folder, or a run that has no checkpoint yet.
        ValueError: a checkpoint is damaged, or holds files that it should not.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give a checkpoint or a run's folder")
    found = list_checkpoints(folder)
    if not found and (folder / FOLDER).is_dir():
        raise FileNotFoundError(f"{path} is a run that has no checkpoint yet")
    folder = found[-1] if found else folder
    if is_checkpoint(folder):
        _refuse_damage(folder, found[:-1])
    return folder


def _refuse_damage(checkpoint: Path, others: list[Path]) -> None:
    alone = Ranks(None)
    damage = find_damage(checkpoint, alone)
    if damage is not None:
        whole = [path for path in others if find_damage(path, alone) is None]
        advice = f"; the one before is whole: {whole[-1]}" if whole else ""
        raise ValueError(f"checkpoint {checkpoint} is damaged: {damage}{advice}")
    more = [name for name in manifest.unlisted(checkpoint) if name not in BESIDE]
    if more:
        raise ValueError(
            f"checkpoint {checkpoint} holds files that its {manifest.NAME} does not list: "
            f"{', '.join(more)}; move them away"
        )


class UnusableState(ValueError):
    """What a run needs to go on is not there."""


class UnknownFormat(ValueError):
    """Another version wrote a checkpoint."""


def read_state(checkpoint: Path) -> TrainState:
    """Counters and options of a checkpoint.

    Raises:
        UnusableState: they are damaged, or of another step than the checkpoint's name says.
        ValueError: they are of a format that this version does not read.
    """
    try:
        values = read_json(checkpoint / STATE)
        number = values.pop("format")
        if type(number) is int and number != FORMAT:
            raise UnknownFormat(
                f"checkpoint {checkpoint} is of format {number}; this version reads {FORMAT}"
            )
        state = TrainState(**values)
        place = (state.loader["epoch"], state.loader["index"])
        counters = (number, state.step, state.tokens, *place)
        sums = (state.expert_flops, state.elapsed_seconds)
        names = state.fingerprint.keys()
    except UnknownFormat:
        raise
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UnusableState(f"{STATE} cannot be used: {error!r}") from error
    if not (all(type(n) is int and n >= 0 for n in counters) and names):
        raise UnusableState(f"{STATE} has counters that are not numbers")
    if not all(type(n) in (int, float) for n in sums):
        raise UnusableState(f"{STATE} has sums that are no numbers")
    if step_of(checkpoint) not in (-1, state.step):
        raise UnusableState(f"{STATE} is of step {state.step}")
    return state


BEFORE_OPTIONS = {"objective": "causal", "model.routing.inner_steps": 1}
"""What runs did that were begun before there was an option for it."""


def changed_options(
    stored: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Options that a run may not change on resuming, but does: old and new value by name.

    A run may be given more steps, not fewer.

    Args:
        stored: what `TrainConfig.fingerprint` gave.
        now: what it gives.
    """
    stored = {**BEFORE_OPTIONS, **stored}
    found = {
        name: (stored.get(name), now.get(name))
        for name in sorted({*stored, *now})
        if stored.get(name) != now.get(name)
    }
    old, new = found.get("steps", (0, 0))
    if type(old) is type(new) is int and old <= new:
        found.pop("steps", None)
    return found
