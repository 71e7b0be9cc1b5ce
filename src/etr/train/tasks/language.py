"""Language modelling: text as every such task reads it, and the decoder that `etr train` trains."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn import functional as F

from etr.data import IGNORED, Batch, OpenedData, TokenLoader, held_out_batches
from etr.hf import EtrForCausalLM
from etr.train.config import TrainConfig
from etr.train.model import build_model
from etr.train.tasks.base import Forward


class TextTask:
    """Prediction of the next token of text, by whatever model a subclass builds.

    Args:
        data: opened text.
    """

    unit = "nats per byte"

    def __init__(self, data: OpenedData) -> None:
        self.data, self.domains = data, data.dataset.domains

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

    def forward(self, model: nn.Module, batch: Batch) -> Forward:
        """Cross-entropy of each next token."""
        # Training rows are never padded.
        mask = None if model.training else batch.valid_mask.long()
        output = model(input_ids=batch.input_ids, attention_mask=mask)
        labels = batch.labels.flatten()
        return Forward(
            token_losses=F.cross_entropy(
                output.logits.float().flatten(0, 1), labels, ignore_index=IGNORED, reduction="none"
            ),
            valid=labels != IGNORED,
            domain=batch.domain[:, None].expand_as(batch.labels).flatten(),
            router_losses=output.router_losses,
            stats=output.routing_stats,
        )


class LanguageTask(TextTask):
    """The transformers decoder that `etr train` trains."""

    def build(self, config: TrainConfig) -> EtrForCausalLM:
        """A fresh decoder, from the seed."""
        length = config.data.sequence_length
        return build_model(config.model, self.data.tokenizer, length, config.seed)
