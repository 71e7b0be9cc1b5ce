"""EtrCallback: the MoE layers of a model under transformers' Trainer, and trainers built on it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from etr.hf.modeling import EtrForCausalLM
from etr.moe import RoutingContext, attach, moe_layers
from etr.moe.stats import routing_shares
from etr.moe.training import Attachment


class EtrCallback(TrainerCallback):
    """Moves capacity schedules, learns thresholds, and logs what routing does.

        Trainer(model, arguments, train_dataset=..., callbacks=[EtrCallback()])

    Works with TRL's SFTTrainer and with adapters too. With several ranks, counters and the balance
    loss count the tokens of all of them. Each row of training metrics gains the shares of
    `etr.moe.stats.routing_shares`, of the last step.

    A capacity schedule runs over the Trainer's steps. Layers that an earlier training has brought
    to the end of theirs stay there: fine-tuning does not start it again.
    """

    def __init__(self) -> None:
        self._trainer: Callable[[], Any] = lambda: None
        self._attachment: Attachment | None = None
        self._models: list[EtrForCausalLM] = []
        self._group: Any = None
        self._top_k: list[int] = []

    def __reduce__(self) -> tuple[type[EtrCallback], tuple[()]]:
        # Models in training hold it; a copy of one, a saved one too, must not drag along the
        # process group, the optimizer and the model.
        return type(self), ()

    @classmethod
    def add_to(cls, trainer: Any) -> EtrCallback:
        """Add one to a Trainer before its other callbacks, so that trackers get its numbers too.

        It then also knows how many micro-batches each step has where the data does not say.
        """
        callback = cls()
        callback._trainer = weakref.ref(trainer)
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Attach to the optimizer.

        Raises:
            ValueError: the model has no MoE layer of this library.
        """
        assert model is not None  # the Trainer always gives it
        self._release()  # a training that failed did not
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.group.WORLD if several else None
        self._attachment = attach(model, optimizer, _total_steps(model, state), group=self._group)
        self._top_k = [layer.config.top_k for layer in moe_layers(model)]
        self._models = [m for m in model.modules() if isinstance(m, EtrForCausalLM)]
        for inner in self._models:
            inner.prepare_context.append(self._prepare)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Say how many micro-batches the step has: the last one of an epoch may have fewer."""
        assert self._attachment is not None
        trainer = self._trainer()
        steps = (
            trainer.current_gradient_accumulation_steps
            if trainer is not None
            else _micro_batches(args, state, train_dataloader)
        )
        self._attachment.loss_scale.share = 1 / steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to a row of training metrics, here and in the state's history."""
        if self._attachment is None or not logs or "loss" not in logs:
            return
        found = routing_shares(self._attachment.last_stats, self._top_k)
        logs.update(found)
        state.log_history[-1].update(found)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Let go of model and optimizer."""
        self._release()

    def _prepare(self, context: RoutingContext) -> RoutingContext:
        return replace(context, data_group=context.data_group or self._group)

    def _release(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        for inner in self._models:
            inner.prepare_context.remove(self._prepare)
        self._attachment, self._models = None, []


def _micro_batches(args: TrainingArguments, state: TrainerState, loader: Any) -> int:
    """Micro-batches of the next optimizer step, as the Trainer counts them."""
    full = args.gradient_accumulation_steps
    if not has_length(loader):
        return full
    steps_in_epoch = max(math.ceil(len(loader) / full), 1)
    is_last = state.global_step % steps_in_epoch == steps_in_epoch - 1
    return (len(loader) % full or full) if is_last else full


def _total_steps(model: nn.Module, state: TrainerState) -> int:
    """Steps of the schedules: the Trainer's, or those of an earlier training that are all done."""
    layers = moe_layers(model)
    earlier = int(layers[0].state.step) - state.global_step if layers else 0
    return earlier if earlier > 0 else max(state.max_steps, 1)
