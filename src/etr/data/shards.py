"""Token shards: one memory-mapped array per domain and split, and a JSON index beside them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from etr.data.corpus import Corpus
from etr.data.tokenizer import encode_documents, fingerprint, text_start
from etr.files import read_object, sha256, sha256_of_file, temporary_sibling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = "etr-token-shards-2"
INDEX = "index.json"
_SHARD_NAME = re.compile(r"\d{3,}-(train|held_out)\.npy")
_DOCUMENTS_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """All documents of one domain and split, one after the other, each ending with eos.

    Each begins as the tokenizer begins texts, with `TokenDataset.document_start`.
    """

    domain: str
    split: str
    """"train" or "held_out"."""
    tokens: NDArray[np.unsignedinteger]
    """Token ids, uint16 or uint32, [num_tokens], read from disk as they are used."""
    document_offsets: NDArray[np.int64]
    """Where each document begins, and the number of tokens, [documents + 1]."""
    num_bytes: int
    """UTF-8 bytes of the documents' text."""


@dataclass(frozen=True, kw_only=True)
class TokenDataset:
    """A tokenised corpus."""

    train: tuple[TokenShard, ...]
    """One shard per domain."""
    held_out: tuple[TokenShard, ...]
    """One shard per domain, in the same order; a shard may be empty."""
    vocab_size: int
    """Tokens in the tokenizer, specials included: the least vocabulary a model needs."""
    eos_token_id: int
    pad_token_id: int
    """The tokenizer's padding token, or eos where it has none."""
    tokenizer_fingerprint: str
    corpus_fingerprint: str
    document_start: tuple[int, ...] = ()
    """Tokens that begin every document, such as bos; empty where a document just follows eos."""
    notes: tuple[str, ...] = ()
    """The corpus's remarks."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains; their places are the numbers in `Batch.domain`."""
        return tuple(shard.domain for shard in self.train)

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the text, the tokenizer, and what begins a document."""
        start = map(str, self.document_start)
        return sha256(self.corpus_fingerprint, self.tokenizer_fingerprint, *start)

    @cached_property
    def bytes_per_token(self) -> dict[str, float]:
        """UTF-8 bytes of held-out text per predicted token, eos included, for each domain.

        Mean loss per token in nats / (ln 2 * bytes_per_token) is bits per byte. A domain
        without held-out text has the value of its training text.
        """
        pairs = zip(self.train, self.held_out, strict=True)
        shards = [held if len(held.tokens) else train for train, held in pairs]
        return {
            shard.domain: shard.num_bytes
            / (len(shard.tokens) - len(self.document_start) * (len(shard.document_offsets) - 1))
            for shard in shards
        }

    @classmethod
    def open(cls, directory: str | Path, *, verify: bool = False) -> TokenDataset:
        """Open what `write_shards` wrote, without reading the tokens.

        Args:
            directory: folder with `index.json` and the shards.
            verify: read every shard and compare its checksum; sizes are always compared.
        Raises:
            FileNotFoundError: no index, or a shard it names is missing.
            ValueError: an index or a shard that is foreign, truncated or altered.
        """
        directory = Path(directory)
        index = _read_index(directory)
        try:
            shards = [_open_shard(directory, entry, index, verify) for entry in index["shards"]]
            content = {key: index[key] for key in _INDEX_FIELDS}
            content["document_start"] = tuple(content["document_start"])
            notes = tuple(index["notes"])
        except (KeyError, TypeError) as error:
            path = str(directory / INDEX)
            raise ValueError(f"{path!r} is incomplete: {error!r}; write the shards anew") from error
        by_split = {
            name: tuple(shard for shard in shards if shard.split == name)
            for name in ("train", "held_out")
        }
        return cls(train=by_split["train"], held_out=by_split["held_out"], notes=notes, **content)


_INDEX_FIELDS = (
    "vocab_size",
    "eos_token_id",
    "pad_token_id",
    "tokenizer_fingerprint",
    "corpus_fingerprint",
    "document_start",
)


def write_shards(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, directory: str | Path
) -> TokenDataset:
    """Tokenise a corpus into `directory`, which appears whole or not at all.

    Shards already there are replaced. Several processes may write the same ones at once.

    Args:
        corpus: what to tokenise.
        tokenizer: needs an eos token.
        directory: where to; its parents are made.
    Returns:
        The dataset, opened.
    Raises:
        ValueError: the tokenizer has no eos token, or the folder holds something else.
    """
    directory = Path(directory)
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos_token, which ends every document; set one")
    for path in directory.iterdir() if directory.exists() else ():
        if path.name != INDEX and not _SHARD_NAME.fullmatch(path.name):
            raise ValueError(f"{str(directory)!r} holds {path.name!r}; give an empty or new folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(directory)
    temporary.mkdir()
    try:
        _write_into(temporary, corpus, tokenizer)
        _move_into_place(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenDataset.open(directory)


def _write_into(folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    eos = tokenizer.eos_token_id
    start = _document_start(tokenizer)
    vocab_size = len(tokenizer)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    shards = []
    for number, domain in enumerate(corpus.domains):
        for split, texts in (("train", domain.train), ("held_out", domain.held_out)):
            documents = [*_encoded(texts, tokenizer, start, dtype)]
            tokens = np.concatenate(documents) if documents else np.empty(0, dtype)
            # Numbered, since a domain's name may be no file name.
            path = folder / f"{number:03d}-{split}.npy"
            np.save(path, tokens, allow_pickle=False)
            shards.append(
                {
                    "domain": domain.name,
                    "split": split,
                    "file": path.name,
                    "file_bytes": path.stat().st_size,
                    "sha256": sha256_of_file(path),
                    "num_tokens": len(tokens),
                    "num_bytes": sum(len(text.encode()) for text in texts),
                    "document_offsets": np.cumsum([0, *map(len, documents)]).tolist(),
                }
            )
    index = {
        "format": FORMAT,
        "dtype": dtype.name,
        "vocab_size": vocab_size,
        "eos_token_id": eos,
        "pad_token_id": eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "corpus_fingerprint": corpus.fingerprint,
        "document_start": start,
        "notes": list(corpus.notes),
        "shards": shards,
    }
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _document_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What begins a document; nothing where it is eos itself, which the one before ends with."""
    start = text_start(tokenizer)
    return [] if start == [tokenizer.eos_token_id] else start


def _encoded(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    start: list[int],
    dtype: np.dtype[Any],
) -> Iterator[NDArray[Any]]:
    """Each document's start, tokens and eos; some at a time, since int64 ids are large."""
    before = np.array(start, dtype=dtype)
    eos = np.array([tokenizer.eos_token_id], dtype=dtype)
    for first in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        for ids in encode_documents(tokenizer, texts[first : first + _DOCUMENTS_AT_ONCE]):
            yield np.concatenate([before, ids.astype(dtype), eos])


def _move_into_place(temporary: Path, directory: Path) -> None:
    try:
        os.rename(temporary, directory)  # whole, also onto an empty folder
        return
    except OSError:
        if not directory.is_dir():
            raise
    # Shards are there already. File by file, so that processes that write the same shards at
    # once never take them from each other; the index last, so that it never names what is not.
    names = {path.name for path in temporary.iterdir()}
    for name in sorted(names, key=lambda name: (name == INDEX, name)):
        os.replace(temporary / name, directory / name)
    for path in directory.iterdir():
        if path.name not in names:
            path.unlink(missing_ok=True)


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"no token shards in {str(directory)!r}: {INDEX} is missing")
    index = read_object(path)
    if index.get("format") != FORMAT:
        raise ValueError(f"{str(path)!r} is not an index of token shards of format {FORMAT!r}")
    return index


def _open_shard(
    directory: Path, entry: dict[str, Any], index: dict[str, Any], verify: bool
) -> TokenShard:
    path = directory / Path(entry["file"]).name  # an index never points outside its folder
    if not path.is_file():
        raise FileNotFoundError(f"shard {str(path)!r} is missing; write the shards anew")
    size = path.stat().st_size
    if size != entry["file_bytes"]:
        raise ValueError(
            f"shard {str(path)!r} has {size} bytes, its index says {entry['file_bytes']}: it is "
            "truncated or foreign; write the shards anew"
        )
    if verify and sha256_of_file(path) != entry["sha256"]:
        raise ValueError(f"shard {str(path)!r} does not match its checksum; write the shards anew")
    try:
        tokens = np.load(path, mmap_mode="r" if entry["num_tokens"] else None, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"shard {str(path)!r} is no .npy file: {error}") from error
    if tokens.dtype.name != index["dtype"] or tokens.shape != (entry["num_tokens"],):
        raise ValueError(
            f"shard {str(path)!r} holds {tokens.dtype.name} {tokens.shape}, its index says "
            f"{index['dtype']} ({entry['num_tokens']},); write the shards anew"
        )
    return TokenShard(
        domain=entry["domain"],
        split=entry["split"],
        tokens=tokens,
        document_offsets=np.asarray(entry["document_offsets"], dtype=np.int64),
        num_bytes=entry["num_bytes"],
    )
