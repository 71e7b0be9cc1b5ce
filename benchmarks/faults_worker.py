"""``python -m benchmarks.faults_worker FAULT RANK STEP OPTIONS``: `etr train`, one rank at fault.

FAULT is raise (a RuntimeError) or hang (sleep for ever), on RANK, before optimizer step STEP.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from etr.cli import main
from etr.train.loop import Trainer

MESSAGE = "this rank is broken"


def spoil(fault: str, rank: int, step: int) -> None:
    """Give the training step its fault."""
    whole = Trainer.train_step

    def train_step(trainer: Trainer) -> Any:
        if (trainer.ranks.rank, trainer.step) == (rank, step):
            if fault == "raise":
                raise RuntimeError(MESSAGE)
            time.sleep(1e6)
        return whole(trainer)

    Trainer.train_step = train_step  # type: ignore[method-assign]


if __name__ == "__main__":
    spoil(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sys.exit(main(["train", *sys.argv[4:]]))
