"""Similarity of texts by a local embedding model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.pretrained import from_local


class Embedder:
    """Cosine of mean-pooled embeddings; the score of open answers in arXiv 2406.00023.

    Args:
        folder: a transformers model, encoder or language model, with its tokenizer; safetensors.
        max_tokens: longer texts are cut.
    Raises:
        FileNotFoundError: no such folder, or no model in it.
    """

    def __init__(self, folder: str | Path, max_tokens: int = 512) -> None:
        from transformers import AutoTokenizer

        from etr.hf.loading import load_base

        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"embedder={str(folder)!r} is not a folder of a model")
        self._tokenizer: Any = from_local(AutoTokenizer, folder)
        self._model: Any = load_base(folder)
        self._max_tokens = max_tokens

    def __call__(self, left: str, right: str) -> float:
        """Cosine of two texts, -1 to 1; 0 if one of them has no token."""
        first, second = self.embed(left), self.embed(right)
        return float(F.cosine_similarity(first, second, dim=0))

    @torch.no_grad()
    def embed(self, text: str) -> Tensor:
        """Mean of the last hidden states over the tokens, float [H]; zeros without a token."""
        inputs = self._tokenizer(
            text, return_tensors="pt", truncation=True, max_length=self._max_tokens
        )
        ids = inputs["input_ids"].long()
        if not ids.numel():
            return torch.zeros(self._model.config.hidden_size)
        states = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return states[0].float().mean(0)
