"""The command `etr`: one file a verb, each with ``run(arguments)``.

`etr_command`, beside the package, has the table of verbs and the entry point.
"""

from __future__ import annotations

import importlib
import sys

from etr.cli._errors import in_one_line
from etr_command import VERBS as VERBS
from etr_command import main as main


def run(verb: str, arguments: list[str]) -> int:
    """Run a verb of `VERBS`; errors a person can act on are printed without a traceback."""
    return in_one_line(verb, lambda: _run(verb, arguments))


def _run(verb: str, arguments: list[str]) -> int | None:
    module = importlib.import_module(f"etr.cli.{verb}")
    _import_files(arguments)
    _quiet_transformers()
    from etr.cli._progress import pulse

    with pulse(verb):
        found: int | None = module.run(arguments)
    return found


def _import_files(arguments: list[str]) -> None:
    """Run the files that ``--import`` names; options that are read after it name their methods."""
    from etr.methods import import_file

    for place, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == "--import" and (equals or place + 1 < len(arguments)):
            import_file(value if equals else arguments[place + 1])


def _quiet_transformers() -> None:
    """Leave the terminal to our own progress; saving a small model needs no bar."""
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
