"""Language modelling: text as every such task reads it, and the decoder that `etr train` trains."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from etr.data import (
    Batch,
    OpenedData,
    TokenLoader,
    held_out_batches,
    held_out_documents,
    mask_token,
)
from etr.hf import EtrForCausalLM
from etr.model.objective import Causal, Objective, draws
from etr.train.config import TrainConfig
from etr.train.model import build_model
from etr.train.tasks.base import Forward


class TextTask:
    """A language model's objective on text, by whatever model a subclass builds.

    Args:
        data: opened text.
        objective: what is trained on; None for the next token.
    """

    unit = "nats per byte"

    def __init__(self, data: OpenedData, objective: Objective | None = None) -> None:
        self.data, self.domains, self.corpus = data, data.dataset.domains, data.corpus
        self.objective = (objective or Causal()).masked_by(mask_token(data.tokenizer))

    def training_batches(
        self, config: TrainConfig, rank: int = 0, world_size: int = 1
    ) -> TokenLoader:
        """Batches in the seed's order; of each batch, the rows of one of several ranks.

        Raises:
            ValueError: ranks cannot have equally many rows.
        """
        if config.data.batch_size % world_size:
            raise ValueError(
                f"batch_size={config.data.batch_size} sequences cannot be divided among "
                f"{world_size} ranks: give a multiple"
            )
        return TokenLoader(
            self.data.dataset,
            sequence_length=config.data.sequence_length,
            batch_size=config.data.batch_size // world_size,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
        )

    def held_out_batches(self, config: TrainConfig) -> Iterator[Batch]:
        """Evenly spaced held-out rows of every domain."""
        return held_out_batches(
            self.data.dataset,
            config.data.sequence_length,
            config.data.batch_size,
            config.eval_tokens_per_domain,
        )

    def documents(self, config: TrainConfig) -> Tensor:
        """Which document each of their labels is of."""
        length, most = config.data.sequence_length, config.eval_tokens_per_domain
        return torch.from_numpy(held_out_documents(self.data.dataset, length, most))

    def forward(self, model: nn.Module, batch: Batch) -> Forward:
        """Loss of each place; what the objective draws depends on the batch alone."""
        text = batch.text(padded=not model.training)
        example = self.objective.example(text, draws(batch.input_ids.tolist()))
        output = model(**example.arguments())
        return Forward(
            token_losses=self.objective.losses(output.logits, example),
            valid=example.counted.flatten(),
            domain=batch.domain[:, None].expand_as(example.labels).flatten(),
            router_losses=output.router_losses,
            stats=output.routing_stats,
        )


class LanguageTask(TextTask):
    """The transformers decoder that `etr train` trains."""

    def build(self, config: TrainConfig) -> EtrForCausalLM:
        """A fresh decoder, from the seed."""
        length = config.data.sequence_length
        return build_model(config.model, self.data.tokenizer, length, config.seed)
