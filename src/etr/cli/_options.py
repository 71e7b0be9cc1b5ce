"""Options from config dataclasses, by tyro."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

from etr.cli._short_help import description, main_options
from etr.import_option import Imports
from etr.methods import METHODS, options_of

T = TypeVar("T")
Source = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Target = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithImports:
    """What verbs share that read models: `etr.cli.run` runs these files before anything else."""

    imports: Imports = ()
    """Python file that adds methods of your own, where the model was made with one. May be
    repeated."""


USUAL = {
    "lr": "--learning-rate",
    "epochs": "--steps",
    "max-steps": "--steps",
    "num-steps": "--steps",
    "iters": "--steps",
    "bs": "--batch-size",
    "per-device-train-batch-size": "--batch-size",
    "gradient-accumulation-steps": "--accumulation-steps",
    "seq-len": "--sequence-length",
    "max-seq-length": "--sequence-length",
    "context-length": "--sequence-length",
    "n-experts": "--num-experts",
    "num-local-experts": "--num-experts",
    "num-experts-per-tok": "--top-k",
    "topk": "--top-k",
    "k": "--top-k",
    "layers": "--num-layers",
    "num-hidden-layers": "--num-layers",
    "heads": "--num-heads",
    "num-attention-heads": "--num-heads",
    "dim": "--hidden-size",
    "d-model": "--hidden-size",
    "ffn-size": "--expert-size",
    "intermediate-size": "--expert-size",
    "output": "--out",
    "output-dir": "--out",
    "dataset": "--data",
    "dtype": "--precision",
    "max-tokens": "--max-new-tokens",
    "max-length": "--max-new-tokens",
    "capacity-factor": "--capacity factor:capacity_factor=NUMBER",
    "aux-loss-coef": "--aux-alpha",
    "router-aux-loss-coef": "--aux-alpha",
    "wd": "--weight-decay",
    "grad-clip": "--max-grad-norm",
    "warmup": "--warmup-steps",
    "save-every": "--checkpoint-every",
    "save-steps": "--checkpoint-every",
    "eval-steps": "--eval-every",
}
"""What other programs call an option, to what it is called here."""


HELP_OPTIONS = {"-h", "--help", "--help-all"}
FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.PositionalMetavarFromFieldName)
"""Options without the names of the configs that they are nested in, positionals by name."""


def parse(kind: type[T], verb: str, arguments: list[str], default: T | None = None) -> T:
    """Read a dataclass from the command line; nested fields are flat options.

    ``--help`` shows the main options and ends the program, ``--help-all`` shows all of them.

    Args:
        kind: the dataclass.
        verb: name of the verb.
        arguments: of the command line.
        default: where options that are not named come from; the dataclass's own by default.
    Raises:
        ValueError: an option that other programs have and this verb has under another name.
    """
    if not HELP_OPTIONS.isdisjoint(arguments):
        _show_help(kind, verb, arguments, default)
    known = _names(kind)
    for argument in arguments:
        name = argument.removeprefix("--").partition("=")[0].replace("_", "-")
        usual = USUAL.get(name) if argument.startswith("--") and name not in known else None
        if usual is not None and usual.split()[0].removeprefix("--") in known:
            raise ValueError(f"there is no option --{name}; use {usual}")
    words = _with_methods(verb, arguments, known) if "router" in known else arguments
    return tyro.cli(
        kind,
        prog=f"etr {verb}",
        args=words,
        config=FLAT,
        default=tyro.MISSING_NONPROP if default is None else default,
    )


def _show_help(kind: type[T], verb: str, arguments: list[str], default: T | None) -> NoReturn:
    shown: Any = kind
    words = ["--help" if word in HELP_OPTIONS else word for word in arguments]
    if dataclasses.is_dataclass(kind):  # others have parts, which the words choose from
        words = ["--help"]
        if short := "--help-all" not in arguments:
            shown, default = main_options(kind, verb, default), None
    else:
        short = False
    print(description(kind, verb, short=short))
    start = tyro.MISSING_NONPROP if default is None else default
    tyro.cli(shown, prog=f"etr {verb}", args=words, description="", config=FLAT, default=start)
    raise SystemExit(0)


def _with_methods(verb: str, arguments: list[str], known: set[str]) -> list[str]:
    """Arguments in which a method after ``--router`` is written out as the options that it sets.

    Options that are named beside it win.

    Raises:
        ValueError: the method sets what this verb has no option for.
    """
    words = list(arguments)
    named = {word.removeprefix("--").partition("=")[0].replace("_", "-") for word in words}
    for place, word in enumerate(words):
        name, equals, text = word.partition("=")
        if name != "--router" or not (equals or place + 1 < len(words)):
            continue
        text = text if equals else words[place + 1]
        if text.partition(":")[0] not in METHODS:
            continue
        options = options_of(text)
        set_too = {key.replace("_", "-"): value for key, value in options.items()}
        for key, option in zip(options, set_too, strict=True):
            if option not in known:
                raise ValueError(f"router={text!r} sets {key}, for which etr {verb} has no option")
        router = set_too.pop("router", None)
        words[place : place + (1 if equals else 2)] = [] if router is None else ["--router", router]
        more = {key: value for key, value in set_too.items() if key not in named}
        return [*(f"--{key}={value}" for key, value in more.items()), *words]
    return words


def _names(kind: Any) -> set[str]:
    """Options of a dataclass, those of nested ones too."""
    found: set[str] = set()
    hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    for field in dataclasses.fields(kind) if hints else ():
        found.add(field.name.replace("_", "-"))
        found |= _names(hints[field.name])
    return found
