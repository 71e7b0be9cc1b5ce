"""A short training of a model that is there, a batch a step, without a run's folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from etr.data import Batch
from etr.hf import EtrForCausalLM
from etr.model.objective import Objective
from etr.moe import attach
from etr.parallel import Ranks
from etr.train.config import OptimizerConfig
from etr.train.loop import TrainingDiverged
from etr.train.model import widen_weights
from etr.train.optimizer import build_optimizer, learning_rate
from etr.train.step import take_step
from etr.train.step_loss import StepLoss


def train_briefly(
    model: EtrForCausalLM,
    batches: Sequence[Batch],
    config: OptimizerConfig,
    objective: Objective | None = None,
    *,
    before_step: Callable[[int], None] = lambda step: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train whatever requires a gradient, in place.

    Capacities and router losses are those of the layers, as in any training. Waits for the device
    at every step.

    Args:
        model: ends in eval mode, with float32 weights.
        batches: text, at least one.
        config: of the optimizer, with its warm-up and decay.
        objective: what is trained on; None for the next token.
        before_step: called with each step's number, from 1, before it.
        on_step: called with each step's number and loss.
    Returns:
        Mean of the objective at each step, nats per token.
    Raises:
        TrainingDiverged: the loss became NaN or infinite.
    """
    widen_weights(model)
    optimizer = build_optimizer(model, config)
    loss_of = StepLoss(model, Ranks(None), "fp32", objective)
    device = next(model.parameters()).device
    losses: list[float] = []

    def backward(batch: Batch) -> float:
        loss = loss_of.backward([batch.to(device)], len(losses))[0]
        if not math.isfinite(loss):
            raise TrainingDiverged(f"loss is {loss} at step {len(losses) + 1}")
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        return loss

    model.train()
    attachment = attach(model, optimizer, len(batches))
    try:
        for step, batch in enumerate(batches):
            before_step(step + 1)
            rate = learning_rate(config, step, len(batches))
            losses.append(take_step(optimizer, partial(backward, batch), rate))
            on_step(step + 1, losses[-1])
    finally:
        optimizer.zero_grad()
        attachment.detach()
        model.eval()
    return losses
