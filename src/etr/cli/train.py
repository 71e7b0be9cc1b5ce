"""`etr train`: train a language model."""

from __future__ import annotations

from etr.cli._options import parse
from etr.cli._progress import training_progress
from etr.train import TrainConfig, train


def run(arguments: list[str]) -> int:
    """Train, showing progress."""
    config = parse(TrainConfig, "train", arguments)
    with training_progress(config.steps) as progress:
        result = train(config, on_step=lambda row: progress.step("train", row))
    if result.stopped:
        print(
            f"stopped after step {result.steps}; go on with: etr train --out {config.out} "
            "--resume and the same options"
        )
        return 130
    print(f"trained {result.steps} steps; metrics and checkpoints are in {result.run}")
    return 0
