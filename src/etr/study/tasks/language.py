"""Language modelling on text: what `text-x` and `lm` share, and `lm` itself."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn import functional as F

from etr.data import IGNORED, Batch, DataConfig, TokenLoader, held_out_batches, open_data
from etr.study.tasks.base import Forward
from etr.train import ModelConfig, OptimizerConfig, RoutingOptions, TrainConfig, build_model


class LanguageTask:
    """Next-byte prediction with the demo's language model."""

    unit = "nats per byte"

    def __init__(self, config: TrainConfig) -> None:
        self.data = open_data(config.data)
        self.domains = self.data.dataset.domains

    def build(self, config: TrainConfig) -> nn.Module:
        """The transformers decoder that `etr train` trains."""
        length = config.data.sequence_length
        return build_model(config.model, self.data.tokenizer, length, config.seed)

    def training_batches(self, config: TrainConfig) -> Iterator[Batch]:
        """Batches in the seed's order."""
        return TokenLoader(
            self.data.dataset,
            sequence_length=config.data.sequence_length,
            batch_size=config.data.batch_size,
            seed=config.seed,
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


def held_out_tokens(steps: int) -> int:
    """Held-out tokens of each domain per evaluation; runs too short to conclude from take few."""
    return 8192 if steps >= 100 else 256


def language_model(steps: int = 1000) -> TrainConfig:
    """The demo's decoder with four MoE layers, twice as wide inside its experts."""
    return TrainConfig(
        data=DataConfig(sequence_length=256, batch_size=8),
        model=ModelConfig(
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            num_key_value_heads=4,
            routing=RoutingOptions(num_experts=8, expert_size=512),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        steps=steps,
        eval_tokens_per_domain=held_out_tokens(steps),
    )
