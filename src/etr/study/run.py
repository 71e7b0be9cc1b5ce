"""One row of a study with one seed: train, evaluate, write one small JSON file."""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from etr.files import whole_file, write_json
from etr.moe import attach
from etr.study.probe import evaluate
from etr.study.tasks import TASKS, open_task
from etr.train import TrainConfig, parse_variant
from etr.train.compare import environment
from etr.train.metrics import expert_flops, routing_metrics
from etr.train.optimizer import build_optimizer, learning_rate
from etr.train.step import take_step
from etr.train.tasks import Task, backward

FORMAT = 1
EVALUATIONS = 5
"""Evaluations along a run of 100 steps or more, the last at its end; shorter runs have one."""
SELECTIONS: tuple[str, ...] = ("threshold", "dropless")
LAST_SHARE = 0.1
"""Share of the steps at the end over which kept shares are averaged."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What makes one run; equal runs give equal losses."""

    task: str
    """Name in TASKS."""
    variant: str
    """Router and options, as `etr.train.parse_variant` reads them."""
    steps: int
    """Optimizer steps."""
    seed: int
    """Seed of weights, batches, and (in `teacher`) of the problem."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown; choose one of {', '.join(TASKS)}")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        self.config()

    @property
    def row(self) -> str:
        """Name of the row: the variant's name."""
        return parse_variant(self.variant).name

    def config(self) -> TrainConfig:
        """The full config of the run."""
        shared = dataclasses.replace(TASKS[self.task].config(self.steps), seed=self.seed)
        return parse_variant(self.variant).apply(shared)

    def path(self, folder: Path) -> Path:
        """Where its result is written."""
        return folder / self.task / f"{self.row}-{self.steps}-seed{self.seed}.json"


@dataclass(kw_only=True)
class _Course:
    """What is measured along a run."""

    seconds: list[float] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    expert_flops: float = 0.0
    documents: dict[str, list[float]] | None = None

    def evaluated(self, step: int, train_loss: float, found: dict[str, Any]) -> None:
        self.documents = found.pop("documents")
        spent = {"expert_flops": self.expert_flops, "cpu_seconds": sum(self.seconds)}
        self.curve.append({"step": step, **spent, "train_loss": train_loss, **found})

    def summary(self, top_k: int) -> dict[str, Any]:
        last = self.rows[-max(1, round(LAST_SHARE * len(self.rows))) :]
        return {
            "expert_flops": self.expert_flops,
            "cpu_seconds": sum(self.seconds),
            "step_seconds_median": statistics.median(self.seconds),
            "kept_per_token": _mean(self.rows, "kept_per_choice") * top_k,
            "kept_per_token_last": _mean(last, "kept_per_choice") * top_k,
            "max_violation_last": _mean(last, "max_violation"),
            "tokens_without_expert_last": _mean(last, "tokens_without_expert"),
            "curve": self.curve,
            "final": self.curve[-1],
            "documents": self.documents,
        }


def execute(
    run: Run,
    folder: Path,
    *,
    config: TrainConfig | None = None,
    weights: Path | None = None,
    on_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train a run and write its result; nothing is left behind if it is stopped.

    Times are processor seconds of this process, which other work on the machine hardly touches.

    Args:
        run: what to train.
        folder: of the results.
        config: what a stored result was made from, to replay it; by default the run's own.
        weights: folder for the trained weights, or None to drop them.
        on_step: called with the number of steps done.
    """
    config = config or run.config()
    task = open_task(run.task, TASKS[run.task].config(1))
    model = task.build(config).train()
    optimizer = build_optimizer(model, config.optimizer)
    attachment = attach(model, optimizer, config.steps)
    batches = task.training_batches(config)

    def gradient() -> torch.Tensor:
        return backward(task, model, next(batches), config.optimizer.max_grad_norm)

    course = _Course()
    count = EVALUATIONS if config.steps >= 100 else 1
    due = {round(config.steps * (i + 1) / count) for i in range(count)}
    for step in range(config.steps):
        began = time.process_time()
        rate = learning_rate(config.optimizer, step, config.steps)
        loss = take_step(optimizer, gradient, rate)
        course.seconds.append(time.process_time() - began)
        stats = attachment.last_stats
        course.expert_flops += expert_flops(model, stats)
        course.rows.append(routing_metrics(stats, config.model.routing.top_k))
        on_step(step + 1)
        if step + 1 in due:
            last = step + 1 == config.steps
            course.evaluated(step + 1, float(loss), _evaluate(task, config, model, last))
    attachment.detach()
    result = {
        "format": FORMAT,
        "run": dataclasses.asdict(run),
        "config": config.to_dict(),
        "environment": {**environment(), "corpus": task.corpus},
        "unit": task.unit,
        "steps": config.steps,
        "tokens_per_step": config.data.sequence_length * config.data.batch_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        **course.summary(config.model.routing.top_k),
    }
    if weights is not None:
        _save(model, weights / run.path(Path()).with_suffix(".safetensors"))
    write_json(run.path(folder), result)
    return result


def _evaluate(
    task: Task, config: TrainConfig, model: torch.nn.Module, by_document: bool
) -> dict[str, Any]:
    """Dropless and threshold, both always; a row without thresholds has dropless alone. By document
    as served."""
    documents = task.documents(config) if by_document else None
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MoE layer evaluates dropless")
        for selection in SELECTIONS:
            result = evaluate(task, model, task.held_out_batches(config), selection, documents)
            found[result.selection] = dataclasses.asdict(result)
    losses = {selection: of_mode.pop("documents") for selection, of_mode in found.items()}
    served = found.get("threshold", found["dropless"])
    served_as = served["selection"]
    return {
        "served": served_as,
        "served_loss": served["loss"],
        "documents": losses[served_as],
        **found,
    }


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def _save(model: torch.nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    with whole_file(path) as temporary:
        save_model(model, str(temporary))


def load_model(run: Run, weights: Path) -> torch.nn.Module:
    """The trained model of a run whose weights were kept.

    Raises:
        FileNotFoundError: they were not.
    """
    from safetensors.torch import load_model as load

    path = weights / run.path(Path()).with_suffix(".safetensors")
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: the run's weights were not kept; remove its result to run it "
            "again"
        )
    task = open_task(run.task, TASKS[run.task].config(1))
    model = task.build(run.config())
    load(model, str(path))
    return model.eval()


__all__ = ["Run", "execute", "load_model"]
