"""torchrun without the start of interpreters: agents and ranks are forks that have imported all."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from gloo_ranks import context

from benchmarks.settings import ROOT


class ForkedAgent:
    """torchrun in a process of its own, which forks its ranks.

    Agent, rendezvous, signals and restarts are torchrun's own. What is spared is a new interpreter
    for each process, which imports for many times as long as a short run trains.

    Args:
        options: of torchrun.
        command: module that each rank runs, and its arguments.
        environment: variables beside those of this process.
        log: gets what is printed, after what it holds.
    """

    def __init__(
        self, options: list[str], command: list[str], environment: dict[str, str], log: Path
    ) -> None:
        module, *arguments = command
        spec = find_spec(module)
        assert spec is not None
        if spec.submodule_search_locations is not None:
            spec = find_spec(f"{module}.__main__")
        assert spec is not None
        assert spec.origin is not None
        words = [*options, "--run-path", "--start-method", "fork", spec.origin, *arguments]
        values = {**os.environ, **environment}
        self._process = context().Process(target=_torchrun, args=(words, values, str(log)))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end; its exit code."""
        self._process.join(timeout)
        return self._process.exitcode


def _torchrun(words: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with open(log, "ab") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    torch.set_num_threads(1)
    from torch.distributed.run import main

    main(words)
