"""A process that trains the demo model one step at a time: `python -m benchmarks.step_worker`.

It imports `etr` from the folder that PYTHONPATH names, which may be another checkout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def main(options: dict[str, Any]) -> None:
    """Answer every line on standard input with the seconds of one step."""
    torch.set_num_threads(options["threads"])
    if options["mallopt"]:
        from benchmarks.settings import keep_freed_memory

        keep_freed_memory()
    answers = sys.stdout
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
        trainer = make_trainer(options, out)
        with trainer:
            print(json.dumps({"ready": True}), file=answers, flush=True)
            for _ in sys.stdin:
                rows = trainer.train_step()
                row = rows[0] if isinstance(rows, list) else rows  # older: one row
                answer = {"seconds": row["step_time_seconds"], "drop_rate": row.get("drop_rate")}
                print(json.dumps(answer), file=answers, flush=True)


def make_trainer(options: dict[str, Any], out: str) -> Any:
    """The trainer of one variant of the recipe.

    Raises:
        ValueError: `etr` was imported from elsewhere than asked for.
    """
    import etr
    from etr.data import open_data
    from etr.train.loop import Trainer
    from etr.train.variants import parse_variant

    source = Path(options["source"])
    if not Path(etr.__file__).resolve().is_relative_to(source.resolve()):
        raise ValueError(f"source={str(source)!r}, but etr was imported from {etr.__file__}")
    recipe = getattr(importlib.import_module("etr.recipes.demo"), options["recipe"])
    config = parse_variant(options["variant"]).apply(recipe(out).run)
    config = dataclasses.replace(config, out=out, device=options["device"])
    return Trainer(config, open_data(config.data))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
