"""The training loop: micro-batches, optimizer steps, metrics, evaluation, checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.data import IGNORED, Batch, OpenedData, TokenLoader, held_out_batches, open_data
from etr.evaluate import EvalResult, evaluate
from etr.hf import EtrForCausalLM
from etr.moe import attach, moe_layers
from etr.moe.config import EvalSelection
from etr.train.checkpoint import TrainState, list_checkpoints, load_checkpoint, save_checkpoint
from etr.train.config import TrainConfig
from etr.train.files import write_json
from etr.train.interrupt import stop_on_interrupt
from etr.train.metrics import (
    MetricsFile,
    ScalarSink,
    expert_flops,
    routing_metrics,
    tensorboard_sink,
)
from etr.train.model import build_model
from etr.train.optimizer import build_optimizer, learning_rate

Row = dict[str, Any]


class TrainingDiverged(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run leaves behind.

    Args:
        model: the trained model, in eval mode.
        data: what it was trained on.
        run: its folder.
        steps: optimizer steps done; fewer than asked for if stopped.
        stopped: the run was interrupted after saving.
    """

    model: EtrForCausalLM
    data: OpenedData
    run: Path
    steps: int
    stopped: bool


def train(
    config: TrainConfig,
    *,
    data: OpenedData | None = None,
    on_step: Callable[[Row], None] = lambda row: None,
) -> TrainResult:
    """Train a language model; metrics and checkpoints go to ``config.out``.

    Ctrl-C finishes the step, saves and returns with ``stopped``; a second one ends at once.

    Args:
        config: everything about the run.
        data: opened data, to share it between runs; by default it is opened from the config.
        on_step: called with each row of metrics, e.g. to draw a progress bar.
    Raises:
        TrainingDiverged: the loss is NaN or infinite.
        ValueError: the run's folder holds another run, or a checkpoint cannot be used.
    """
    trainer = Trainer(config, data or open_data(config.data))
    with trainer, stop_on_interrupt() as asked_to_stop:
        while not trainer.finished:
            trainer.advance(on_step)
            if asked_to_stop():
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
        self.config, self.data = config, data
        self.run = Path(config.out)
        self.device = _device(config.device)
        length = config.data.sequence_length
        self.model = build_model(config.model, data.tokenizer, length, config.seed)
        torch.nn.Module.to(self.model, self.device).train()
        if config.gradient_checkpointing:
            # Renamed in later versions of transformers, which deprecate the old name.
            model = self.model
            enable = getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )
            enable()
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.loader = TokenLoader(
            data.dataset,
            sequence_length=length,
            batch_size=config.data.batch_size,
            seed=config.seed,
        )
        self.step, self.tokens, self.expert_flops, self.elapsed = 0, 0, 0.0, 0.0
        self.saved: Path | None = None
        self.saved_step = 0
        self._open_run()
        self.attachment = attach(self.model, self.optimizer, config.steps)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.attachment.detach()
        self._metrics.close()
        if self._board is not None:
            self._board.close()

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.config.steps

    def advance(self, on_step: Callable[[Row], None] = lambda row: None) -> None:
        """One step, and the evaluation and checkpoint that are due after it."""
        on_step(self.train_step())
        if self.finished or self.step % self.config.eval_every == 0:
            for row in self.evaluate():
                on_step(row)
        if self.finished or self.step % self.config.checkpoint_every == 0:
            self.save()

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

    def train_step(self) -> Row:
        """One optimizer step; returns and writes its row of metrics."""
        began = time.perf_counter()
        rate = learning_rate(self.config.optimizer, self.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss, losses = 0.0, dict[str, float]()
        count = self.config.accumulation_steps
        for batch in islice(self.loader, count):
            nats, router_losses = self._forward(batch.to(self.device))
            total = nats + sum(router_losses.values())
            (total / count).backward()
            loss += float(nats.detach()) / count
            for name, value in router_losses.items():
                losses[name] = losses.get(name, 0.0) + float(value.detach()) / count
            self.tokens += batch.input_ids.numel()
        if not math.isfinite(loss):
            self._diverged(loss)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.optimizer.max_grad_norm
        )
        self.optimizer.step()
        stats = self.attachment.last_stats
        self.step += 1
        self.expert_flops += expert_flops(self.model, stats)
        seconds = time.perf_counter() - began
        self.elapsed += seconds
        per_step = count * self.loader.tokens_per_batch
        return self._write(
            "train",
            step_time_seconds=seconds,
            tokens_per_second=per_step / seconds,
            loss=loss,
            losses=losses,
            grad_norm=float(norm),
            learning_rate=rate,
            **routing_metrics(stats, self.config.model.routing.top_k),
        )

    def evaluate(self) -> list[Row]:
        """Held-out loss in the configured selection, and dropless."""
        asked = self.config.model.routing.eval_selection
        rows, done = [], set[str]()
        for selection in (asked, "dropless"):
            result = self.evaluate_as(selection)
            if result.selection not in done:
                done.add(result.selection)
                rows.append(
                    self._write(
                        "eval",
                        selection=result.selection,
                        val_loss=result.loss,
                        val_loss_by_domain=result.loss_by_domain,
                        kept_fraction_eval=result.kept_fraction,
                    )
                )
        return rows

    def evaluate_as(self, selection: EvalSelection) -> EvalResult:
        """Held-out loss with a given selection."""
        return evaluate(
            self.model, held_out(self.config, self.data), self.data.dataset.domains, selection
        )

    def save(self) -> None:
        """Write a checkpoint, unless this step has one."""
        if self.saved is not None and self.saved_step == self.step:
            return
        state = TrainState(
            step=self.step,
            tokens=self.tokens,
            expert_flops=self.expert_flops,
            elapsed_seconds=self.elapsed,
            loader=self.loader.state_dict(),
            fingerprint=_fingerprint(self.config),
        )
        self.saved_step = self.step
        self.saved = save_checkpoint(
            self.run,
            self.model,
            self.data.tokenizer,
            self.optimizer,
            state,
            self.config.keep_checkpoints,
        )

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            output = self.model(input_ids=batch.input_ids)
        nats = F.cross_entropy(
            output.logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED
        )
        return nats, output.router_losses

    def _open_run(self) -> None:
        checkpoints = list_checkpoints(self.run)
        if self.config.resume:
            if not checkpoints:
                raise ValueError(f"resume: {self.run} has no checkpoint; start without resume")
            self._restore(checkpoints[-1])
        elif checkpoints:
            raise ValueError(
                f"out={self.config.out!r} already holds a run with checkpoints; continue it with "
                "resume, or choose another folder"
            )
        self.run.mkdir(parents=True, exist_ok=True)
        write_json(self.run / "config.json", self.config.to_dict())
        self._metrics = MetricsFile(self.run / "metrics.jsonl", after_step=self.step)
        self._board: ScalarSink | None = tensorboard_sink(self.run / "tensorboard")

    def _restore(self, checkpoint: Path) -> None:
        state = load_checkpoint(checkpoint, self.model, self.optimizer, _fingerprint(self.config))
        self.step, self.tokens, self.expert_flops = state.step, state.tokens, state.expert_flops
        self.elapsed = state.elapsed_seconds
        self.loader.load_state_dict(state.loader)
        self.saved, self.saved_step = checkpoint, state.step

    def _write(self, kind: str, **values: Any) -> Row:
        row = {
            "kind": kind,
            "step": self.step,
            "tokens": self.tokens,
            "expert_flops": self.expert_flops,
            "elapsed_seconds": self.elapsed,
            **values,
        }
        self._metrics.write(row)
        if self._board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{kind}/{name}", value, self.step)
        return row

    def _diverged(self, loss: float) -> None:
        layers = []
        for layer in moe_layers(self.model):
            counts = layer.pending.get("num_tokens_per_expert")
            kept = "none" if counts is None else counts.tolist()
            norm = sum(float(p.detach().float().norm()) ** 2 for p in layer.parameters()) ** 0.5
            layers.append(f"layer {layer.layer_index}: weight norm {norm:.3g}, kept {kept}")
        good = self.saved or "none was saved"
        raise TrainingDiverged(
            f"loss is {loss} at step {self.step + 1}; last good checkpoint: {good}; "
            + "; ".join(layers)
        )


def held_out(config: TrainConfig, data: OpenedData) -> Iterator[Batch]:
    """The held-out batches that a run is evaluated on."""
    return held_out_batches(
        data.dataset,
        config.data.sequence_length,
        config.data.batch_size,
        config.eval_tokens_per_domain,
    )


def _fingerprint(config: TrainConfig) -> dict[str, Any]:
    """Options that change what is learned, flat, so that a difference can be named."""
    values = config.to_dict()
    free = ("out", "resume", "device", "eval_every", "checkpoint_every", "keep_checkpoints")
    for name in (*free, "gradient_checkpointing", "eval_tokens_per_domain"):
        values.pop(name)
    values["data"].pop("cache_dir", None)
    return json.loads(json.dumps(_flat(values)))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        if found is not None:
            return found
    return torch.device("cpu")
