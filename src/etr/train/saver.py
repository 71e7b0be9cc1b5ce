"""When a run writes checkpoints, and which one it goes on from."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from etr.hf import EtrForCausalLM
from etr.moe.notice import warn
from etr.parallel import Ranks
from etr.parallel.storage import staged
from etr.train.checkpoint import SaveError, Snapshot, load_checkpoint, write_checkpoint
from etr.train.checkpoint_folder import FOLDER, TrainState, find_damage, list_checkpoints

log = logging.getLogger(__name__)


class Saver:
    """Writes a run's checkpoints, one at a time. A full disk costs a checkpoint, not the run.

    Args:
        run: the run's folder.
        keep: newest checkpoints kept.
        background: copy to the host's memory and write from there while training goes on.
        ranks: every rank has a saver and calls it at the same steps.

    Attributes:
        saved: the newest checkpoint written or resumed from, or None.
    """

    def __init__(self, run: Path, keep: int, background: bool, ranks: Ranks) -> None:
        self.saved: Path | None = None
        self._run, self._keep, self._ranks = run, keep, ranks
        self._writers = ranks.aside() if background else ranks
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = -1

    def save(self, step: int, take: Callable[[], Snapshot]) -> None:
        """Write a checkpoint of this step, unless it has one; waits for the one before.

        A failure is a warning, and the checkpoints before it stay.
        """
        self.wait()
        if step == self._step:
            return
        log.info("writing a checkpoint of step %d", step)
        what = take()
        if not self._background:
            self._write(what)
            return
        what = Snapshot(
            model=what.model,
            tokenizer=what.tokenizer,
            weights=staged(what.weights),
            optimizer=staged(what.optimizer),
            state=what.state,
        )
        self._thread = threading.Thread(target=self._write_aside, args=(what,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def resume(
        self,
        model: EtrForCausalLM,
        optimizer: torch.optim.Optimizer,
        fingerprint: dict[str, Any],
    ) -> TrainState:
        """Go back to the newest checkpoint whose files are whole; a warning names damaged ones.

        Raises:
            ValueError: there is none, or it is of another config.
        """
        paths = [self._run / FOLDER / name for name in self.names()]
        if not paths:
            raise ValueError(f"resume: {self._run} has no checkpoint; start without resume")
        for path in reversed(paths):
            damage = find_damage(path, self._ranks)
            if damage is None:
                state = load_checkpoint(path, model, optimizer, fingerprint, self._ranks)
                self.saved, self._step = path, state.step
                return state
            if self._ranks.is_first:
                warn(f"checkpoint {path} is damaged ({damage}): trying the one before")
        raise ValueError(
            f"resume: every checkpoint of {self._run} is damaged; start afresh in another folder"
        )

    def names(self) -> list[str]:
        """Checkpoints that there are, oldest first, as rank 0 sees them."""
        return self._ranks.from_first([path.name for path in list_checkpoints(self._run)])

    def _write(self, what: Snapshot) -> None:
        try:
            self.saved = write_checkpoint(self._run, what, self._keep, self._writers)
            self._step = what.state.step
        except SaveError as error:
            if self._ranks.is_first:
                warn(
                    f"no checkpoint of step {what.state.step} ({error}); training goes on, the "
                    f"newest checkpoint is {self.saved or 'none'}"
                )

    def _write_aside(self, what: Snapshot) -> None:
        try:
            self._write(what)
        except BaseException as error:  # for the thread that trains
            self._error = error
