"""The byte tokenizer with what many checkpoints' tokenizers have: bos before every text."""

from __future__ import annotations

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from etr.data import byte_tokenizer

BOS, EOS = 257, 258


def bos_tokenizer(single: str = "<bos> $A") -> PreTrainedTokenizerFast:
    """A byte tokenizer that writes `single` for a text $A."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return tokenizer
