"""What a verb takes from the run that it is given: its options, and its text."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from etr.cli._options import parse
from etr.data import DataConfig, mask_token
from etr.model import OBJECTIVES, Objective
from etr.parallel import is_launched
from etr.train import TrainConfig
from etr.train.checkpoint_folder import changed_options, list_checkpoints, run_of
from etr.train.config import stored_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Where:
    """Which run is meant; a part of `TrainConfig`."""

    out: str = TrainConfig.out
    resume: bool = TrainConfig.resume
    auto_resume: bool = TrainConfig.auto_resume


def parse_training(arguments: list[str]) -> TrainConfig:
    """Options of `etr train`; where a run goes on, those not named are the run's own.

    Raises:
        ValueError: an option is named with another value than the run has, which may not change.
    """
    kind = (tyro.conf.OmitArgPrefixes,)
    where, _ = tyro.cli(
        Where, args=arguments, config=kind, return_unknown_args=True, add_help=False
    )
    run = Path(where.out)
    goes_on = where.resume or (where.auto_resume and bool(list_checkpoints(run)))
    stored = stored_config(run) if goes_on else None
    if stored is None:
        return parse(TrainConfig, "train", arguments)
    own = dataclasses.replace(stored, **dataclasses.asdict(where), imports=())
    config = parse(TrainConfig, "train", arguments, own)
    config = dataclasses.replace(config, imports=config.imports or stored.imports)
    changed = changed_options(stored.fingerprint(), config.fingerprint())
    if changed:
        pairs = ", ".join(
            f"--{name.rpartition('.')[2].replace('_', '-')} is {old!r} there, not {new!r}"
            for name, (old, new) in changed.items()
        )
        raise ValueError(
            f"{run} goes on with its own options: {pairs}; leave them out, or name another --out "
            "to train anew"
        )
    return config


def parse_with_text(
    kind: type[T], verb: str, arguments: list[str], models: Callable[[T], Sequence[str]]
) -> T:
    """Options of a verb that reads text; where its model is a run, the run's own unless named.

    Says which text it is.

    Args:
        kind: has a field `data`.
        verb: name of the verb.
        arguments: of the command line.
        models: paths of the models that the verb is given.
    Raises:
        ValueError: several runs have different text, and none is named.
    """
    config: Any = parse(kind, verb, arguments)
    paths = models(config)
    named = any(word.partition("=")[0] == "--data" for word in arguments)
    runs = {
        str(run): data for path in paths if (run := run_at(path)) and (data := _text(run, named))
    }
    if runs:
        if not named:
            _refuse_different(runs)
        own = dataclasses.replace(config, data=next(iter(runs.values())))
        config = parse(kind, verb, arguments, own)
    if paths:
        whose = f" (of {next(iter(runs))})" if runs and not named else ""
        print(f"text: {', '.join(config.data.data)}{whose}", flush=True)
    found: T = config
    return found


def run_at(path: str) -> Path | None:
    """The run of a path to it or to a checkpoint in it; None for another model."""
    folder = Path(path)
    return folder if list_checkpoints(folder) else run_of(folder)


def objective_for(text: str | None, path: str, tokenizer: PreTrainedTokenizerBase) -> Objective:
    """What a text names, or else what the model of a path was trained on, with its mask."""
    found: Objective = OBJECTIVES.parse(objective_of(path) if text is None else text)
    return found.masked_by(mask_token(tokenizer))


def objective_of(path: str) -> str:
    """What the model of a path was trained on; the next token where no run says."""
    run = run_at(path)
    with contextlib.suppress(ValueError):  # a damaged config.json says nothing
        stored = None if run is None else stored_config(run)
        return TrainConfig.objective if stored is None else stored.objective
    return TrainConfig.objective


def say_which(folder: Path) -> None:
    """Name a run's checkpoint and its text, where the output is not in their way."""
    run = run_of(folder)
    with contextlib.suppress(ValueError):  # a damaged config.json is of no use here
        stored = None if run is None else stored_config(run)
        text = "" if stored is None else f", trained on {', '.join(stored.data.data)}"
        print(f"{folder}{text}", file=sys.stderr)


def command_line(verb: str, arguments: Sequence[str]) -> str:
    """A command as it can be copied into a shell; on many ranks, with its launcher."""
    words = [verb, *arguments]
    if is_launched():
        ranks, here = os.environ["WORLD_SIZE"], os.environ.get("LOCAL_WORLD_SIZE")
        # What launches several machines is not known here.
        launcher = ["torchrun", "--nproc-per-node", ranks] if ranks == here else ["..."]
        return shlex.join([*launcher, "-m", "etr", *words])
    return shlex.join(
        ["etr", *words] if shutil.which("etr") else [sys.executable, "-m", "etr", *words]
    )


def _text(run: Path, named: bool) -> DataConfig | None:
    try:
        stored = stored_config(run)
    except ValueError:
        if not named:
            raise
        return None
    return None if stored is None else stored.data


def _refuse_different(runs: dict[str, DataConfig]) -> None:
    texts = {(data.data, data.max_bytes_per_domain) for data in runs.values()}
    if len(texts) > 1:
        found = "; ".join(f"{run}: {', '.join(data.data)}" for run, data in runs.items())
        raise ValueError(f"the runs were trained on different text ({found}): name --data")
