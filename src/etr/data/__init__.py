"""Text to token batches: corpora, tokenizers, memory-mapped shards, resumable loaders.

    Corpus        named domains, training and held-out documents   (builtin_corpus, load_corpus)
    tokenizer     text <-> token ids                               (byte_tokenizer, train_bpe)
    TokenDataset  token ids on disk, memory-mapped                 (write_shards, open)
    Batch         rows of token ids, labels, domains               (TokenLoader, held_out_batches)

`open_data(DataConfig(...))` walks the first three steps, with a cache for each.
"""

from etr.data.batch import IGNORED, Batch
from etr.data.builtin import builtin_corpus
from etr.data.config import DataConfig, OpenedData, open_data
from etr.data.corpus import Corpus, Domain, load_corpus, merge
from etr.data.loader import TokenLoader, held_out_batches, held_out_documents
from etr.data.shards import TokenDataset, TokenShard, write_shards
from etr.data.tokenizer import (
    BYTE_VOCAB_SIZE,
    byte_tokenizer,
    encode_documents,
    encode_prompt,
    load_tokenizer,
    mask_token,
    train_bpe,
)

__all__ = [
    "BYTE_VOCAB_SIZE",
    "IGNORED",
    "Batch",
    "Corpus",
    "DataConfig",
    "Domain",
    "OpenedData",
    "TokenDataset",
    "TokenLoader",
    "TokenShard",
    "builtin_corpus",
    "byte_tokenizer",
    "encode_documents",
    "encode_prompt",
    "held_out_batches",
    "held_out_documents",
    "load_corpus",
    "load_tokenizer",
    "mask_token",
    "merge",
    "open_data",
    "train_bpe",
    "write_shards",
]
