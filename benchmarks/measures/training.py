"""Training steps of the demo model, each variant in a process of its own, one step each in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.measures.steps import OnNote, run_rounds
from benchmarks.results import Row
from benchmarks.rounds import Seconds
from benchmarks.settings import ROOT, Settings

VARIANTS = {
    "baseline": "baseline",
    "etr, factor 1.1": "etr=etr/capacity=factor:capacity_factor=1.1",
    "etr, factor 0.6": "etr=etr/capacity=factor:capacity_factor=0.6",
}
"""What is trained, as `etr compare` writes it; constant factors, since a schedule's first steps say
nothing about the rest."""
BEFORE = ", other checkout"


def measure_training(case: Case, settings: Settings, on_note: OnNote) -> list[Row]:
    """Rows of the variants, and of the other checkout's if there is one."""
    with ExitStack() as stack:
        workers: dict[str, StepWorker] = {}
        for name, variant in VARIANTS.items():
            on_note(f"starting {name}")
            workers[name] = stack.enter_context(StepWorker(variant, ROOT / "src", settings))
            if settings.against:
                source = Path(settings.against).resolve() / "src"
                worker = StepWorker(variant, source, settings)
                workers[name + BEFORE] = stack.enter_context(worker)
        steps = {name: worker.step for name, worker in workers.items()}
        found = run_rounds(steps, case.budget, on_note)
        return [
            Row(
                system=name,
                kind="rival" if name == "baseline" or name.endswith(BEFORE) else "ours",
                default=name == "etr, factor 1.1",
                seconds=found[name],
                drop_rate=worker.drop_rate,
            )
            for name, worker in workers.items()
        ]


class StepWorker:
    """A process that trains one step whenever it is asked to.

    Args:
        variant: what it trains.
        source: folder that holds the package `etr`.
        settings: threads, allocator, sizes.
    """

    def __init__(self, variant: str, source: Path, settings: Settings) -> None:
        if not (source / "etr" / "__init__.py").is_file():
            raise ValueError(f"against: {source} holds no package etr; name a checkout's root")
        options = {
            "variant": variant,
            "source": str(source),
            "threads": settings.threads,
            "mallopt": settings.mallopt,
            "recipe": "smoke" if settings.quick else "demo",
            "device": str(settings.device),
        }
        self.drop_rate: float | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step_worker", json.dumps(options)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(source)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def step(self) -> Seconds:
        """Train one step; its seconds as the trainer counts them."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._read()
        self.drop_rate = answer["drop_rate"]
        return {"step": answer["seconds"]}

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the training process ended with {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> StepWorker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
