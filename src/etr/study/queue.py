"""Runs side by side in processes of one thread each; what is done already is not done again."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from etr.files import read_json
from etr.methods import import_file
from etr.study.run import FORMAT, Run, execute

REPORT_EVERY = 10
"""Steps between two notes of progress."""


def load(run: Run, folder: Path) -> dict[str, Any] | None:
    """The result of a run, or None where it is not there yet.

    Raises:
        ValueError: the file is of another run or format.
    """
    path = run.path(folder)
    if not path.exists():
        return None
    found = read_json(path)
    result: dict[str, Any] = found if isinstance(found, dict) else {}
    if result.get("format") != FORMAT or result.get("run") != dataclasses.asdict(run):
        raise ValueError(
            f"{path} holds another run ({result.get('run')}); move it away or rename the row"
        )
    return result


def run_all(
    runs: Sequence[Run],
    folder: Path,
    *,
    weights: Path | None = None,
    workers: int = 2,
    imports: tuple[str, ...] = (),
    on_progress: Callable[[dict[Run, int]], None] = lambda steps: None,
) -> None:
    """Execute what is missing.

    Every result is on disk as soon as its run ends, so a study that is stopped, even killed, goes
    on where it was; only runs in flight begin again.

    Args:
        runs: all different.
        folder: of the results.
        weights: folder for trained weights, or None.
        workers: processes.
        imports: Python files with methods of one's own, which every process runs first.
        on_progress: called about twice a second with the steps done of each run in flight.
    """
    missing = [run for run in runs if load(run, folder) is None]
    if not missing:
        return
    # Workers are copies of a process that has imported all, which takes longer than a short run.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Manager() as manager:
        steps = manager.dict()
        pool = ProcessPoolExecutor(
            workers, mp_context=context, initializer=_begin, initargs=(imports,)
        )
        waiting = {
            pool.submit(_work, run, folder, weights, steps, number, imports)
            for number, run in enumerate(missing)
        }
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                on_progress({missing[number]: count for number, count in dict(steps).items()})
                for future in done:
                    future.result()
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()


def _begin(imports: tuple[str, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    for path in imports:
        import_file(path)


def _work(
    run: Run,
    folder: Path,
    weights: Path | None,
    steps: Any,
    number: int,
    imports: tuple[str, ...],
) -> None:
    def note(step: int) -> None:
        if step % REPORT_EVERY == 0 or step == run.steps:
            steps[number] = step

    config = dataclasses.replace(run.config(), imports=imports)
    execute(run, folder, config=config, weights=weights, on_step=note)
