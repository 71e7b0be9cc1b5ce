"""What ``etr VERB --help`` shows: an example, what the verb does, and its main options.

``--help-all`` shows every option.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from etr.field_notes import default_of, field_notes
from etr.methods import METHODS
from etr_command import VERBS


@dataclass(frozen=True, kw_only=True)
class Help:
    """The help of one verb.

    Args:
        example: a command to begin with.
        main: fields whose options are shown; all where none is named.
        note: what somebody asks first.
    """

    example: str
    main: tuple[str, ...] = ()
    note: str = ""


HELP = {
    "demo": Help(example="etr demo"),
    "train": Help(
        example="etr train --steps 400 --router etr --out runs/mine",
        main=(
            *("data", "out", "steps", "router", "capacity", "num_experts", "top_k"),
            *("batch_size", "learning_rate", "resume"),
        ),
        note="""\
Which router?
  --router etr           the default: drops much early in training, little at its end
  --router baseline      a learned linear router, capacity factor 1.1: the one to beat
  --router token_choice  the same, dropping the lowest scores and sending no padding
  --router etr_paper     the method as published
etr methods lists all {methods} and what each claims; etr methods NAME shows the options
of one (--router NAME:option=value); etr compare tries them on your text.""",
    ),
    "compare": Help(
        example="etr compare --variants baseline etr --steps 400 --out runs/mine",
        main=(
            *("variants", "seeds", "data", "out", "steps", "num_experts", "top_k"),
            *("batch_size", "learning_rate", "eval_every", "preset"),
        ),
        note="""\
The first variant is what the others are compared with; etr methods lists them.
A variant may have options: "small=etr/capacity=factor:capacity_factor=0.6".
One seed shows costs; a difference in loss takes three or more: --seeds 0 1 2.""",
    ),
    "compare --preset rivals": Help(example="etr compare --preset rivals --out runs/rivals"),
    "compare --preset winner": Help(example="etr compare --preset winner --out runs/winner"),
    "consolidate": Help(example="etr consolidate runs/many models/whole"),
    "generate": Help(
        example='etr generate runs/train --prompt "def "',
        main=("model", "prompt", "max_new_tokens", "temperature", "top_p", "seed", "selection"),
    ),
    "evaluate": Help(
        example="etr evaluate runs/train",
        main=(
            *("models", "data", "tasks", "limit", "selection", "max_tokens_per_domain"),
            *("batch_size", "json", "markdown"),
        ),
        note="Several models stand side by side. Without --data: the run's own held-out text.",
    ),
    "convert": Help(
        example="etr convert models/mixtral models/etr --router keep",
        main=("source", "target", "router", "to", "capacity", "calibrate", "compare"),
        note="""\
--router keep computes what the model did; --router etr swaps its routers at a cost,
which etr finetune --recover wins back in part.""",
    ),
    "transform": Help(
        example="etr transform renumber SRC DST --plan plan.json",
        main=("name", "source", "target", "plan", "calibrate", "num_batches", "compare"),
    ),
    "compose": Help(
        example="etr compose composition runs/python runs/math --data builtin:python builtin:math",
        main=("name", "models", "data", "out", "prompt_length", "prompts_per_domain", "start"),
        note="""\
composition   one model for a prompt, by its category, within a budget of weights
fusion_route  one for each token, chosen by a model that is trained here and adds its logits""",
    ),
    "upcycle": Help(
        example="etr upcycle models/dense models/sparse --num-experts 8",
        main=(
            *("source", "target", "num_experts", "experts", "top_k", "router", "capacity"),
            *("noise", "seed", "compare"),
        ),
    ),
    "finetune": Help(
        example="etr finetune models/kept --recover --out models/recovered",
        main=(
            *("model", "recover", "teacher", "out", "data", "steps", "learning_rate"),
            *("capacity", "into_fixed", "save_dtype"),
        ),
    ),
    "sft": Help(
        example="etr sft runs/train --data chats.jsonl --out models/chat",
        main=(
            *("model", "data", "out", "epochs", "steps", "batch_size", "learning_rate"),
            *("max_length", "lora_rank", "precision"),
        ),
    ),
    "export": Help(
        example="etr export runs/train models/plain",
        main=("source", "target", "data", "num_batches", "max_shard_bytes"),
    ),
    "calibrate": Help(
        example="etr calibrate runs/train",
        main=("model", "data", "num_batches", "batch_size", "sequence_length", "save_to"),
    ),
    "trace": Help(
        example="etr trace runs/train",
        main=("model", "data", "out", "max_tokens", "selection", "segment", "device"),
    ),
    "plan": Help(example="etr plan round_robin runs/train/trace.parquet --ranks 4"),
    "cache": Help(example="etr cache runs/train/trace.parquet"),
    "watch": Help(example="etr watch runs/train"),
    "methods": Help(example="etr methods etr"),
    "theory": Help(example="etr theory check"),
    "report": Help(example="etr report runs/compare"),
    "study": Help(example="etr study --smoke --out runs/study-smoke"),
    "cluster": Help(example="etr cluster emulate --nodes 2 -- etr train --steps 20"),
    "cluster emulate": Help(example="etr cluster emulate --nodes 2 -- etr train --steps 20"),
    "cluster measure": Help(example="torchrun --nproc-per-node 4 -m etr cluster measure"),
    "cluster bench": Help(example="etr cluster bench --smoke"),
    "cluster plan": Help(
        example="etr cluster plan --model mixtral-8x7b --cluster h100",
        main=(
            *("model", "cluster", "routings", "trace", "sequence_length", "batch"),
            *("tensor", "pipeline", "expert", "out"),
        ),
        note="Models, clusters and routings are names that come with the library, or files.",
    ),
    "cluster paper": Help(example="etr cluster paper --page paper-clusters.md"),
    "cluster calibrate": Help(example="etr cluster calibrate --results runs/cluster/results.json"),
    "cluster scale": Help(example="etr cluster scale --devices 10000"),
    "cluster clean": Help(example="etr cluster clean"),
}
"""Help of each verb, and of the parts of those that have parts."""


def description(kind: Any, verb: str, *, short: bool) -> str:
    """What stands above the options.

    Args:
        kind: the verb's config.
        verb: name of the verb.
        short: only main options are shown.
    """
    found = HELP[verb]
    what = VERBS[verb] if verb in VERBS else (inspect.getdoc(kind) or "").rstrip(".")
    parts = [f"Example: {found.example}", f"{what[:1].upper()}{what[1:]}."]
    if found.note:
        parts.append(found.note.format(methods=len(METHODS)))
    if short and found.main:
        more = len(leaves(kind)) - len(found.main)
        parts.append(f"These are the main options; etr {verb} --help-all shows {more} more.")
    return "\n\n".join(parts) + "\n"


def main_options(kind: type, verb: str, default: Any) -> type:
    """A dataclass of a verb's main options, flat, with the notes of the fields that they are of.

    Args:
        kind: the verb's config.
        verb: name of the verb.
        default: an instance of it that defaults come from; None for the fields' own.
    """
    fields = leaves(kind, default)
    names = HELP[verb].main or tuple(fields)
    return dataclasses.make_dataclass(
        kind.__name__, [(name, *fields[name]) for name in names], kw_only=True
    )


def leaves(kind: type, default: Any = None) -> dict[str, tuple[Any, Any]]:
    """Annotation and field of each option, those of nested configs too."""
    found: dict[str, tuple[Any, Any]] = {}
    hints, notes = typing.get_type_hints(kind, include_extras=True), field_notes(kind)
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name) if default is not None else default_of(field)
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            inner = None if value is dataclasses.MISSING else value
            found |= leaves(typing.cast(type, hint), inner)
            continue
        help_text = tyro.conf.arg(help=notes.get(field.name, ""))
        found[field.name] = (Annotated[hint, help_text], dataclasses.field(default=value))
    return found
