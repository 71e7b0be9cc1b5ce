"""The training loop: micro-batches, optimizer steps, metrics, evaluation, checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from etr.data import OpenedData, open_data
from etr.evaluate import EvalResult, evaluate
from etr.files import write_json
from etr.hf import EtrForCausalLM
from etr.moe import attach, moe_layers
from etr.moe.losses import even_losses
from etr.moe.notice import warn
from etr.parallel import Ranks, clip_gradients, sum_gradients
from etr.train.alarms import Alarms
from etr.train.checkpoint import Snapshot, snapshot
from etr.train.checkpoint_folder import TrainState
from etr.train.config import TrainConfig
from etr.train.diagnose import diagnose, mixed_batches
from etr.train.folders import (
    CONFIG,
    has_metrics,
    refuse_unless_run,
    set_metrics_aside,
    writing,
)
from etr.train.interrupt import stop_on_interrupt
from etr.train.metrics import (
    expert_flops,
    layer_metrics,
    layers_in_words,
    memory_bytes,
    router_grad_norms,
    routing_metrics,
)
from etr.train.model import enable_checkpointing, find_device
from etr.train.optimizer import build_optimizer, learning_rate
from etr.train.profile import profile_pass
from etr.train.recorder import MetricsRow, Recorder
from etr.train.saver import Saver
from etr.train.spread import spread
from etr.train.step import take_step
from etr.train.step_loss import StepLoss
from etr.train.tasks import LanguageTask
from etr.train.trackers import require_trackers


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run leaves behind."""

    model: EtrForCausalLM
    """The trained model, in eval mode."""
    data: OpenedData
    """What it was trained on."""
    run: Path
    """Its folder."""
    steps: int
    """Optimizer steps done; fewer than asked for if stopped."""
    stopped: bool
    """Whether the run was interrupted after saving."""


def train(
    config: TrainConfig,
    *,
    data: OpenedData | None = None,
    on_step: Callable[[MetricsRow], None] = lambda row: None,
) -> TrainResult:
    """Train a language model; metrics and checkpoints go to ``config.out``.

    Ctrl-C finishes the step, saves and returns with ``stopped``; a second one ends at once.

    Where a process group is initialised, its ranks train one model together, as one process with
    all rows would: every rank calls this with the same config. Rank 0 alone writes metrics.

    A run that goes on may have been given more steps. Learning rate and capacity are from there on
    those that a run of the new number of steps has at the same step.

    Args:
        config: everything about the run.
        data: opened data, to share it between runs; by default it is opened from the config.
        on_step: called on rank 0 with each row of metrics, e.g. to draw a progress bar.
    Raises:
        TrainingDiverged: the loss is NaN or infinite.
        ValueError: the run's folder holds another run or something else, another process writes
            into it, or a checkpoint cannot be used.
    """
    run = Path(config.out)
    refuse_unless_run(run)
    require_trackers(config.trackers)  # before anything is written
    with contextlib.ExitStack() as opened:
        opened.enter_context(writing(run, Ranks.current()))
        trainer = opened.enter_context(Trainer(config, data or open_data(config.data)))
        asked_to_stop = opened.enter_context(stop_on_interrupt())
        while not trainer.finished:
            trainer.advance(on_step)
            if trainer.ranks.any(asked_to_stop()):
                trainer.save()
                break
    return trainer.result()


class Trainer:
    """One run's state between optimizer steps.

    Args:
        config: everything about the run.
        data: opened data.
    """

    def __init__(self, config: TrainConfig, data: OpenedData) -> None:
        require_trackers(config.trackers)
        self.ranks = Ranks.current()
        self.config, self.data = config, data
        self.run = Path(config.out)
        self.device = find_device(config.device)
        task = self.task = LanguageTask(data, config.trained_on())
        self.model = self.task.build(config)
        torch.nn.Module.to(self.model, self.device).train()
        if config.gradient_checkpointing:
            enable_checkpointing(self.model)
        self.mesh = spread(self.model, config.parallel, self.ranks)
        self.step_loss = StepLoss(
            self.model, self.ranks, config.precision, task.objective, config.seed
        )
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.loader = self.task.training_batches(config, self.ranks.rank, self.ranks.size)
        self.step, self.tokens, self.expert_flops, self.elapsed = 0, 0, 0.0, 0.0
        self.saver = Saver(
            self.run, config.keep_checkpoints, config.background_checkpoints, self.ranks
        )
        self._open_run()
        self.attachment = attach(self.model, self.optimizer, config.steps, group=self.ranks.group)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.attachment.detach()
        if self._recorder is not None:
            self._recorder.close()
        if kind is None:
            self.saver.wait()

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.steps

    def advance(self, on_step: Callable[[MetricsRow], None] = lambda row: None) -> None:
        """One step, and what is due after it: evaluation, diagnostics, profile, checkpoint."""
        for work in self._due():
            for row in work():
                on_step(row)
        if self.finished or self.step % self.config.checkpoint_every == 0:
            self.save()

    def _due(self) -> Iterator[Callable[[], list[MetricsRow]]]:
        """What this step asks for, in order."""
        diagnostics = self.config.diagnostics and self.ranks.size == 1
        if self.step == 0 and diagnostics:
            yield self.diagnose
        yield self.train_step
        if self.finished or self.step % self.config.eval_every == 0:
            yield self.evaluate
            if diagnostics:
                yield self.diagnose
        every = self.config.profile_every
        if every is not None and (self.finished or (every and self.step % every == 0)):
            yield self.profile

    def result(self) -> TrainResult:
        """What the run leaves behind, as it stands."""
        self.model.eval()
        return TrainResult(
            model=self.model,
            data=self.data,
            run=self.run,
            steps=self.step,
            stopped=not self.finished,
        )

    def train_step(self) -> list[MetricsRow]:
        """One optimizer step; writes and returns its row of metrics, and alarms."""
        began = time.perf_counter()
        rate = learning_rate(self.config.optimizer, self.step, self.config.steps)
        loss, losses, router_norms, norm = take_step(self.optimizer, self._backward, rate)
        stats = self.attachment.last_stats
        self.step += 1
        self.expert_flops += expert_flops(self.model, stats)
        seconds = time.perf_counter() - began
        self.elapsed += seconds
        per_step = self.config.accumulation_steps * self.loader.tokens_per_batch
        self.tokens += per_step
        values = routing_metrics(stats, self.config.model.routing.top_k)
        layers = zip(moe_layers(self.model), stats, router_norms, strict=True)
        for into, (layer, counts, router_norm) in zip(values["layers"], layers, strict=True):
            into |= {**layer_metrics(layer, counts), "router_grad_norm": router_norm}
        return self._write(
            "train",
            step_time_seconds=seconds,
            tokens_per_second=per_step / seconds,
            loss=loss,
            losses=losses,
            grad_norm=norm,
            learning_rate=rate,
            memory_bytes=memory_bytes(self.device),
            **values,
        )

    def _backward(self) -> tuple[float, dict[str, float], list[float | None], float]:
        """The clipped gradient of a step; losses, and norms of the gradient before clipping."""
        micro_batches = islice(self.loader, self.config.accumulation_steps)
        batches = [batch.to(self.device) for batch in micro_batches]
        loss, losses = self.step_loss.backward(batches, self.step)
        self._last_batch = batches[-1]
        if not math.isfinite(loss):
            self._diverged(loss)
        if self.mesh is not None:
            sum_gradients(self.model, self.mesh)
        router_norms = router_grad_norms(self.model, self.ranks)
        max_norm = self.config.optimizer.max_grad_norm
        norm = clip_gradients(self.model.parameters(), max_norm, self.ranks)
        return loss, losses, router_norms, norm

    def evaluate(self) -> list[MetricsRow]:
        """Held-out loss in the configured selection, and dropless."""
        asked = self.config.model.routing.eval_selection
        rows, done = [], set[str]()
        for selection in (asked, "dropless"):
            result = self.evaluate_as(selection)
            if result.selection not in done:
                done.add(result.selection)
                rows += self._write(
                    "eval",
                    selection=result.selection,
                    val_loss=result.loss,
                    val_loss_by_domain=result.loss_by_domain,
                    kept_fraction_eval=result.kept_fraction,
                    kept_per_choice=result.kept_per_choice,
                )
        return rows

    def diagnose(self) -> list[MetricsRow]:
        """What routing does to held-out tokens; nothing where there are none."""
        data, count = self.config.data, self.config.diagnostics_tokens
        batches = mixed_batches(self.data.dataset, data.sequence_length, data.batch_size, count)
        if not batches:
            return []
        found = diagnose(self.model, batches, self.task.domains, self.task.objective)
        return self._write("diagnostics", **found)

    def profile(self) -> list[MetricsRow]:
        """Where the time of a forward and backward pass over the last batch goes."""
        batch = self._last_batch
        found = profile_pass(self.model, lambda: self.step_loss.local_loss(batch))
        return self._write("profile", **found)

    def evaluate_as(self, selection: str) -> EvalResult:
        """Held-out loss with a given selection."""
        task, ranks = self.task, self.ranks
        batches, domains = task.held_out_batches(self.config), task.domains
        return evaluate(
            self.model, batches, domains, selection, ranks=ranks, objective=task.objective
        )

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        self.saver.save(self.step, self._snapshot)

    def _snapshot(self) -> Snapshot:
        state = TrainState(
            step=self.step,
            tokens=self.tokens,
            expert_flops=self.expert_flops,
            elapsed_seconds=self.elapsed,
            loader=self.loader.state_dict(),
            fingerprint=self.config.fingerprint(),
        )
        return snapshot(self.model, self.data.tokenizer, self.optimizer, state)

    def _open_run(self) -> None:
        config, names = self.config, self.saver.names()
        if config.resume or (config.auto_resume and names):
            self._restore()
        elif names:
            raise ValueError(
                f"out={config.out!r} already holds a run with checkpoints; continue it with "
                "resume, or choose another folder"
            )
        elif self.ranks.from_first(has_metrics(self.run)):
            self._start_again()
        self._recorder: Recorder | None = None
        if self.ranks.is_first:
            self.run.mkdir(parents=True, exist_ok=True)
            write_json(self.run / CONFIG, config.to_dict())
            layer = moe_layers(self.model)[0]
            alarms = Alarms(even_losses(layer.config.loss_rows, layer.traits))
            self._recorder = Recorder(self.run, self.step, alarms, config.trackers)

    def _start_again(self) -> None:
        """The run was killed before its first checkpoint, or has lost them all."""
        if not self.config.auto_resume:
            raise ValueError(
                f"out={self.config.out!r} holds the metrics of a run without checkpoints; choose "
                "another folder, or begin it again with auto_resume"
            )
        if self.ranks.is_first:
            warn(
                f"{self.run} has metrics and no checkpoint: starting at step 1 again, what there "
                f"was is in {set_metrics_aside(self.run).name}"
            )

    def _restore(self) -> None:
        state = self.saver.resume(self.model, self.optimizer, self.config.fingerprint())
        self.step, self.tokens, self.expert_flops = state.step, state.tokens, state.expert_flops
        self.elapsed = state.elapsed_seconds
        self.loader.load_state_dict(state.loader)

    def _write(self, kind: str, **values: Any) -> list[MetricsRow]:
        """Record a row; it, and the alarms it raises. Nothing but on rank 0."""
        if self._recorder is None:
            return []
        row = {
            "kind": kind,
            "step": self.step,
            "tokens": self.tokens,
            "expert_flops": self.expert_flops,
            "elapsed_seconds": self.elapsed,
            **values,
        }
        if self.task.objective.bound and kind in ("train", "eval"):
            row["bound"] = True  # so that whoever prints a loss says what it is
        return self._recorder.write(row)

    def _diverged(self, loss: float) -> None:
        raise TrainingDiverged(
            f"loss is {loss} at step {self.step + 1}; last good checkpoint: "
            f"{self.saver.saved or 'none was saved'}; {layers_in_words(self.model, self.ranks)}"
        )
