"""`etr train`: train a language model, on one process or under torchrun on many."""

from __future__ import annotations

from torch.distributed.elastic.multiprocessing.errors import record

from etr.cli._of_run import command_line, parse_training
from etr.cli._progress import training_progress
from etr.parallel import Ranks, is_launched, process_group
from etr.train import TrainConfig, TrainResult, train
from etr.train.model import find_device


def run(arguments: list[str]) -> int:
    """Train, showing progress."""
    config = parse_training(arguments)
    # A launcher shows what its ranks raised if they write it down for it.
    return (record(_train)(config) or 0) if is_launched() else _train(config)


def _train(config: TrainConfig) -> int:
    device = find_device(config.device).type
    with process_group(device, config.parallel.timeout_seconds):
        with training_progress(config.steps) as progress:
            result = train(config, on_step=lambda row: progress.step("train", row))
        if Ranks.current().is_first:
            print(_outcome(config, result))
    return 130 if result.stopped else 0


def _outcome(config: TrainConfig, result: TrainResult) -> str:
    if result.stopped:
        command = command_line("train", ["--resume", "--out", config.out])
        return f"stopped after step {result.steps}; go on with:\n{command}"
    return f"trained {result.steps} steps; metrics and checkpoints are in {result.run}"
