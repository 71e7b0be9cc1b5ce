"""Tokenizers that need no download: raw bytes, and byte-level BPE trained on one's own text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from etr.files import sha256
from etr.pretrained import from_local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BYTE_VOCAB_SIZE = 264
"""256 bytes, three special tokens, and unused ones up to a multiple of eight."""

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
"""Padding, beginning and end of a document."""
_UNUSED = "<unused_{}>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose token ids 0 to 255 are the UTF-8 bytes of the text.

    256 is `<pad>`, 257 `<bos>`, 258 `<eos>`, the rest up to `BYTE_VOCAB_SIZE` unused, for masks.
    Nothing is added when encoding, and the specials' names in a text are ordinary text, so that
    `decode(encode(text)) == text` for every text. Saves and loads like any other tokenizer.
    """
    from tokenizers import Tokenizer, models

    unused = [_UNUSED.format(i) for i in range(BYTE_VOCAB_SIZE - 256 - len(SPECIAL_TOKENS))]
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    return _wrap(Tokenizer(models.BPE(vocab=vocab, merges=[])), [*SPECIAL_TOKENS, *unused])


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE.

    Every text can be encoded and comes back unchanged; `<pad>`, `<bos>`, `<eos>` have ids 0, 1
    and 2. Keep the result with `save_pretrained(folder)`, read it with `load_tokenizer(folder)`.

    Args:
        texts: documents to learn from.
        vocab_size: tokens in all, at least 259; fewer come out where the text is too small.
        min_frequency: least occurrences of a pair that is merged.
    Raises:
        ValueError: vocab_size is too small for all bytes and special tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=_byte_characters(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, list(SPECIAL_TOKENS), split_words=True)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from this machine; nothing is downloaded.

    Args:
        name_or_path: "byte", a folder that `save_pretrained` wrote, or the name of a tokenizer
            already in the local Hugging Face cache.
    Raises:
        FileNotFoundError: there is no such tokenizer here.
        ValueError: the tokenizer has no end-of-text token, which ends every document.
    """
    if name_or_path == "byte":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = from_local(AutoTokenizer, name_or_path)
        tokenizer("a")  # values that it cannot use show here
    except Exception as error:  # damaged files make transformers raise errors of every kind
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FileNotFoundError(
            f"tokenizer {str(name_or_path)!r} cannot be loaded; give 'byte', a folder written by "
            f"save_pretrained, or a name in the local Hugging Face cache ({reason})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {str(name_or_path)!r} has no eos_token; set one and save it")
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex SHA-256 of what decides a text's token ids: the same for a copy saved and loaded."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    for transient in ("padding", "truncation"):
        content.pop(transient, None)
    specials = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    vocab = sorted(tokenizer.get_vocab().items())
    return sha256(json.dumps([content, specials, vocab], sort_keys=True))


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[NDArray[np.int64]]:
    """Token ids of each text, without special tokens; names of specials are ordinary text.

    For the byte tokenizer the text's bytes are taken as they are, which is what its own
    `encode` gives, some hundred times faster.
    """
    if not texts:
        return []
    if fingerprint(tokenizer) == fingerprint(byte_tokenizer()):
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]


def text_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids with which a tokenizer begins every text by itself: [bos], or none at all.

    Tokens that it puts after a text are not among them.
    """
    bare = _ids(tokenizer, "a", add_special_tokens=False)
    whole = _ids(tokenizer, "a", add_special_tokens=True)
    if not bare:  # it knows no such letter
        return whole[:-1] if whole[-1:] == [tokenizer.eos_token_id] else whole
    places = range(len(whole) - len(bare) + 1)
    return whole[: next((i for i in places if whole[i : i + len(bare)] == bare), 0)]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text to go on from, begun as the tokenizer begins texts; never empty.

    A text that says the first token itself does not get it twice. What the tokenizer puts after a
    text is left out, since the text goes on. An empty text becomes an end of text where nothing
    begins one: that is what documents follow in training.
    """
    start = text_start(tokenizer)
    ids = _ids(tokenizer, text, add_special_tokens=False)
    if ids[: len(start)] != start:
        ids = start + ids
    return ids or [tokenizer.eos_token_id]


def mask_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the tokenizer's mask token, else of the first token that it holds unused; or None."""
    own: int | None = getattr(tokenizer, "mask_token_id", None)
    found: int | None = tokenizer.get_vocab().get(_UNUSED.format(0)) if own is None else own
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _wrap(
    tokenizer: Any, specials: list[str], *, split_words: bool = False
) -> PreTrainedTokenizerFast:
    """A `tokenizers.Tokenizer` as transformers knows them, exact in both directions."""
    from tokenizers import decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=split_words
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte, 0 to 255.

    Printable Latin-1 characters stand for themselves; the others, in order, for those from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
