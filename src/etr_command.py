"""The console script `etr`. It stands beside the package, whose import takes seconds: help and the
version are answered without."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

VERBS = {
    "demo": "compare baseline and ETR on built-in text; --full: four routers, longer",
    "train": "train a language model",
    "consolidate": "make one model of a checkpoint that many ranks wrote",
    "compare": "train several routers on the same work and report",
    "generate": "continue a text with a trained model",
    "evaluate": "held-out bits per byte of a trained model, by domain",
    "convert": "turn a checkpoint of a known family into one of this library, or back",
    "transform": "make another checkpoint of one: prune, merge, quantise, grow, renumber",
    "compose": "make one model of several that share a tokenizer",
    "upcycle": "make a Mixture-of-Experts model of a dense checkpoint",
    "finetune": "recover old choices after a router swap, or learn to predict as a teacher does",
    "sft": "fine-tune on conversations",
    "export": "write a model for engines that know only linear routers",
    "calibrate": "set a trained model's selection thresholds from text",
    "trace": "record which token goes to which expert, as a Parquet file",
    "plan": "place experts on ranks by a trace",
    "cache": "replay a trace in a memory that holds a few experts",
    "watch": "follow a run while it trains",
    "methods": "list methods, their claims and options, and what goes with what",
    "theory": "success rates, capacities and crossover of the routing theorems",
    "report": "draw the report of runs and comparisons",
    "study": "quality study: every claim at equal steps, compute and time",
    "cluster": "emulate a cluster, measure one, and ETR's benchmark on an emulated one",
}
OLD_NAMES = {"routers": "methods"}
"""Verbs by the name that they had before."""


def main(arguments: list[str] | None = None) -> int:
    """Run a verb, and return the exit status; errors a person can act on are one sentence."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _print(_help())
    verb, *rest = arguments
    if verb in ("-V", "--version"):
        return _print(f"etr {version('etr-moe')}")
    verb = OLD_NAMES.get(verb, verb)
    if verb not in VERBS:
        print(f"etr: there is no verb {verb!r}\n\n{_help()}", file=sys.stderr)
        return 2
    try:
        from etr.cli import run
    except KeyboardInterrupt:  # importing torch takes seconds
        print(f"etr {verb}: interrupted", file=sys.stderr)
        return 130
    return run(verb, rest)


def _print(text: str) -> int:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the interpreter would try to write once again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: etr VERB [options]   (etr VERB --help: main options, --help-all: all of them)",
            "",
            *lines,
        ]
    )
