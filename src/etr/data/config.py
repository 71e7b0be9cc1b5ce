"""From settings to a dataset and its tokenizer, each step cached."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from etr.data.builtin import DEFAULT_MAX_BYTES, SOURCES, builtin_corpus
from etr.data.corpus import Corpus, load_corpus, merge
from etr.data.shards import FORMAT, TokenDataset, write_shards
from etr.data.tokenizer import fingerprint, load_tokenizer, train_bpe
from etr.files import sha256, temporary_sibling
from etr.moe.checked import check_types
from etr.moe.notice import warn
from etr.table import check_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
BUILTIN = "builtin"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read, how to cut it into tokens and batches, and where to cache."""

    data: tuple[str, ...] = ("builtin",)
    """"builtin" (text installed with the library), domains of it ("builtin:python"), and/or paths:
    folders, text files, .jsonl and .parquet with a "text" in each record; .gz too."""
    tokenizer: str = "byte"
    """"byte", "bpe:N" (byte-level BPE of N tokens trained on the data), or a saved one's folder."""
    sequence_length: int = 256
    """Length of a training sequence, tokens."""
    batch_size: int = 8
    """Sequences per micro-batch, over all ranks together."""
    max_bytes_per_domain: int = DEFAULT_MAX_BYTES
    """Most text of each built-in domain, bytes, at least 10,000."""
    cache_dir: str = "~/.cache/etr"
    """Folder for the built-in corpus and token shards; ~ is the home folder."""

    def __post_init__(self) -> None:
        check_types(self)
        if not self.data or not all(self.data):
            raise ValueError(f"data must name 'builtin' or paths, got {self.data!r}")
        for name in self.data:
            if "://" in name:
                raise ValueError(
                    f"data={name!r} is an address, and nothing is read from a network; download it "
                    "and give the file or folder"
                )
            kind, colon, domain = name.partition(":")
            if colon and kind == BUILTIN:
                check_name("built-in domain", domain, SOURCES)
        size = self.tokenizer.removeprefix("bpe:")
        if not self.tokenizer or (size != self.tokenizer and not size.isdecimal()):
            raise ValueError(
                f"tokenizer must be 'byte', 'bpe:N' or a folder, got {self.tokenizer!r}"
            )
        least = {"sequence_length": 1, "batch_size": 1, "max_bytes_per_domain": 10_000}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if not self.cache_dir:
            raise ValueError("cache_dir must be a folder, got an empty name")


@dataclass(frozen=True, kw_only=True)
class OpenedData:
    """Data ready to use."""

    dataset: TokenDataset
    tokenizer: PreTrainedTokenizerBase
    notes: tuple[str, ...]
    """Remarks on the corpus that belong beside results."""

    @property
    def corpus(self) -> str:
        """The corpus in 16 hex digits, which belong beside results: equal where the text is."""
        return self.dataset.corpus_fingerprint[:16]


def open_data(config: DataConfig) -> OpenedData:
    """Read or build the corpus and its token shards.

    Processes may do so at once with the same cache. A damaged cache is built again, with a
    warning.

    Raises:
        FileNotFoundError: a data path or the tokenizer does not exist.
        ValueError: data without text, not UTF-8, or not JSON lines; a BPE vocabulary under 259. See
            `load_corpus`.
    """
    cache_dir = Path(config.cache_dir).expanduser()
    log.info("reading text: %s", ", ".join(config.data))
    corpus = _read_corpus(config, cache_dir)
    tokenizer = _tokenizer(config.tokenizer, corpus, cache_dir)
    key = sha256(FORMAT, corpus.fingerprint, fingerprint(tokenizer))
    directory = cache_dir / f"tokens-{key[:32]}"
    log.info("cutting text into tokens")
    dataset = _cached(directory) or write_shards(corpus, tokenizer, directory)
    return OpenedData(dataset=dataset, tokenizer=tokenizer, notes=corpus.notes)


def _cached(directory: Path) -> TokenDataset | None:
    """The shards in the cache; None where there are none, and a warning where they are damaged."""
    if not directory.exists():
        return None
    try:
        return TokenDataset.open(directory, verify=True)
    except (FileNotFoundError, ValueError) as error:
        warn(f"token cache is damaged, building it again: {error}")
        return None


def _tokenizer(name: str, corpus: Corpus, cache_dir: Path) -> PreTrainedTokenizerBase:
    """The named tokenizer; "bpe:N" is trained on the training documents once, then cached."""
    size = name.removeprefix("bpe:")
    if size == name:
        return load_tokenizer(name)
    folder = cache_dir / f"bpe-{size}-{corpus.fingerprint[:32]}"
    if not folder.exists():
        texts = (text for domain in corpus.domains for text in domain.train)
        temporary = temporary_sibling(folder)
        log.info("training a tokenizer of %s tokens", size)
        train_bpe(texts, int(size)).save_pretrained(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was first: use its tokenizer, as all do
            shutil.rmtree(temporary)
    return load_tokenizer(folder)


def _read_corpus(config: DataConfig, cache_dir: Path) -> Corpus:
    corpora: list[Corpus] = []
    installed = [name for name in config.data if name.partition(":")[0] == BUILTIN]
    if installed:
        whole = builtin_corpus(cache_dir, config.max_bytes_per_domain)
        domains = (d for d in whole.domains if {BUILTIN, f"{BUILTIN}:{d.name}"} & {*installed})
        corpora.append(Corpus(domains=tuple(domains), notes=whole.notes))
    paths = [Path(name).expanduser() for name in config.data if name not in installed]
    if paths:
        corpora.append(load_corpus(paths))
    return merge(corpora)
