"""`text-x`: real text in front of one MoE layer that is the model's main capacity.

The last eight bytes, each through an embedding table of its own place, are summed; one attention
layer mixes in the rest of the row; then comes one MoE layer. So little else can be learned that
the loss is limited by the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etr.moe import Collector, MoE, MoEConfig, RoutingContext
from etr.train.config import TrainConfig
from etr.train.tasks.language import TextTask

WINDOW = 8
"""Bytes that are embedded by their place before the predicted one."""


@dataclass(frozen=True, kw_only=True)
class TextXOutput:
    """Logits [B, S, V], and what the MoE layer left."""

    logits: Tensor
    router_losses: dict[str, Tensor]
    routing_stats: list[Mapping[str, Tensor]]


class TextXModel(nn.Module):
    """Window embedding, causal attention, MoE, linear head; pre-norm residual blocks.

    Args:
        moe: config of the MoE layer.
        vocab_size: V.
        num_heads: attention heads; rotary positions.
    """

    def __init__(self, moe: MoEConfig, vocab_size: int, num_heads: int) -> None:
        super().__init__()
        width = moe.hidden_size
        self.vocab_size, self.num_heads = vocab_size, num_heads
        self.embed_window = nn.Embedding(WINDOW * (vocab_size + 1), width)
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.moe_norm = nn.RMSNorm(width)
        self.head_norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        # Last, so that everything else starts alike whatever random numbers a router takes.
        for weight in (self.embed_window.weight, self.qkv.weight, self.out.weight):
            nn.init.normal_(weight, std=width**-0.5)
        nn.init.normal_(self.head.weight, std=width**-0.5)
        self.moe = MoE(moe)
        generator = torch.Generator().manual_seed(torch.initial_seed() + 1)
        for weight in self.moe.experts.parameters():
            nn.init.normal_(weight, std=width**-0.5, generator=generator)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TextXOutput:
        """Predict the byte after each of [B, S]."""
        x = self._embed(input_ids)
        x = x + self._attend(self.attention_norm(x))
        mask = None if attention_mask is None else attention_mask.bool()
        with Collector(self, ambient=False) as collector:
            context = RoutingContext(valid_mask=mask, token_ids=input_ids, collector=collector)
            x = x + self.moe(self.moe_norm(x), context).hidden_states
        return TextXOutput(
            logits=self.head(self.head_norm(x)),
            router_losses=collector.losses(),
            routing_stats=collector.stats(),
        )

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Sum of the embeddings of a byte and the seven before it, [B, S, H]."""
        before_row = self.vocab_size  # an id of its own stands for what lies before the row
        padded = F.pad(input_ids, (WINDOW - 1, 0), value=before_row)
        windows = padded.unfold(1, WINDOW, 1)
        place = torch.arange(WINDOW, device=input_ids.device) * (self.vocab_size + 1)
        ids = (windows + place).flatten(0, 1)
        rows = F.embedding_bag(ids, self.embed_window.weight, mode="sum")
        return rows.view(*input_ids.shape, -1)

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(_rotate(q), _rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions over the halves of the head width, [B, heads, S, D]."""
    length, half = x.shape[-2], x.shape[-1] // 2
    rate = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(length, device=x.device)[:, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class TextXTask(TextTask):
    """Next-byte prediction with a model that is mostly one MoE layer."""

    def build(self, config: TrainConfig) -> nn.Module:
        """The window model, from the seed."""
        torch.manual_seed(config.seed)
        vocab_size = len(self.data.tokenizer)
        return TextXModel(config.model.moe_config(), vocab_size, config.model.num_heads)
