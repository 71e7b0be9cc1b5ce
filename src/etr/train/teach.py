"""What was made of a model learns to predict as that model does: experts alone, by distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etr.data import OpenedData, TokenLoader, held_out_batches
from etr.evaluate import EvalResult, evaluate
from etr.hf import EtrForCausalLM
from etr.model.objective import IGNORED, Example, Objective, Text
from etr.moe import moe_layers
from etr.train.briefly import train_briefly
from etr.train.config import OptimizerConfig
from etr.train.recover import RecoverConfig


class Imitation(Objective):
    """The examples of an objective, to be answered as a teacher does.

    Args:
        teacher: a language model of this library or of transformers, in eval mode.
        of: makes the examples.
    """

    def __init__(self, teacher: Any, of: Objective) -> None:
        self._teacher, self._of = teacher, of

    def example(self, text: Text, generator: torch.Generator) -> Example:
        return self._of.example(text, generator)

    def losses(self, logits: Tensor, example: Example) -> Tensor:
        """Cross-entropy with the teacher's distribution at each place that is asked."""
        with torch.no_grad():
            wanted = self._teacher(**example.arguments(self._teacher.dtype)).logits
        dtype = torch.promote_types(logits.dtype, torch.float32)
        given = (logits.to(dtype).flatten(0, 1), wanted.to(dtype).flatten(0, 1).softmax(-1))
        nats = F.cross_entropy(*given, reduction="none")
        nats = nats.masked_fill(example.labels.flatten() == IGNORED, 0.0)
        return nats if example.weight is None else nats * example.weight.flatten()


@dataclass(frozen=True, kw_only=True)
class Taught:
    """What a model learned from another."""

    results: dict[str, EvalResult]
    """On held-out text: teacher, before and after."""
    imitation: tuple[float, ...]
    """Cross-entropy with the teacher at each step, nats per token."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values, of the results what is printed."""
        rows = {
            name: {"loss": one.loss, "loss_by_domain": one.loss_by_domain, **one.counted}
            for name, one in self.results.items()
        }
        return {"results": rows, "imitation": list(self.imitation)}


def teach(
    model: EtrForCausalLM,
    teacher: Any,
    data: OpenedData,
    config: RecoverConfig,
    objective: Objective,
    on_step: Callable[[int, str], None] = lambda step, words: None,
) -> Taught:
    """Train the experts of `model` to predict as `teacher`, in place; all else stays as it is.

    The loss is the cross-entropy with the teacher's distribution, and what layers add to it. What
    trains is the weights of the banks: what chooses bits where experts are codes, vectors, factors.

    Args:
        model: ends in eval mode, with float32 weights.
        teacher: of this library or of transformers, of the same vocabulary; on the same device.
        data: text.
        config: its steps, learning rate, batches and held-out tokens.
        objective: of both models.
        on_step: called with each step's number and its loss in words.
    Raises:
        ValueError: vocabularies differ, or the experts have nothing that trains.
        TrainingDiverged: the loss became NaN or infinite.
    """
    if model.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"the teacher has a vocabulary of {teacher.config.vocab_size} tokens, and the model "
            f"one of {model.config.vocab_size}; take the model that it was made of"
        )
    size, length = config.data.batch_size, config.data.sequence_length

    def measured(model: Any) -> EvalResult:
        dataset, most = data.dataset, config.eval_tokens_per_domain
        batches = held_out_batches(dataset, length, size, most)
        return evaluate(model, batches, dataset.domains, objective=objective)

    results = {"teacher": measured(teacher.eval()), "before": measured(model)}
    losses: list[float] = []
    if config.steps:
        loader = TokenLoader(data.dataset, sequence_length=length, batch_size=size)
        with experts_alone(model):
            losses = train_briefly(
                model,
                list(islice(loader, config.steps)),
                OptimizerConfig(learning_rate=config.learning_rate, weight_decay=0.0),
                Imitation(teacher, objective),
                on_step=lambda step, loss: on_step(step, f"imitation {loss:.3f}"),
            )
    results["after"] = measured(model.eval())
    return Taught(results=results, imitation=tuple(losses))


@contextmanager
def experts_alone(model: nn.Module) -> Iterator[None]:
    """Nothing but the weights of banks requires a gradient while the block runs.

    Raises:
        ValueError: they have none.
    """
    trained = {id(p) for layer in moe_layers(model) for p in layer.bank.parameters() if p.numel()}
    if not trained:
        raise ValueError("the experts of the model hold nothing that can be trained")
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(id(p) in trained)
    try:
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)
