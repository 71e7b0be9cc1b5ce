"""A corpus: named domains, each with documents to train on and documents held out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from etr.data.split import HELD_OUT_FRACTION, split
from etr.files import sha256

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".py", ".json", ".jsonl"})
"""Suffixes read from a folder; a file named itself is read whatever its suffix."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Documents of one kind."""

    name: str
    train: tuple[str, ...]
    """Documents to train on."""
    held_out: tuple[str, ...]
    """Documents to measure on; none is, exactly or nearly, among the training ones."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Domains in a fixed order, and remarks on how they came about."""

    domains: tuple[Domain, ...]
    notes: tuple[str, ...] = ()
    """What a reader of results should know: sources replaced, domains with nothing held out."""

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all names and documents."""
        parts: list[str] = []
        for domain in self.domains:
            parts += [domain.name, "train", *domain.train, "held_out", *domain.held_out]
        return sha256(*parts)

    @classmethod
    def from_documents(
        cls,
        documents: Mapping[str, Sequence[str]],
        *,
        held_out_fraction: float = HELD_OUT_FRACTION,
        notes: Iterable[str] = (),
    ) -> Corpus:
        """Split documents into training and held-out ones; see `etr.data.split.split`.

        Args:
            documents: texts of each domain.
            held_out_fraction: share of each domain's bytes to hold out, in [0, 1).
            notes: remarks to keep with the corpus.
        Raises:
            ValueError: no domain, a domain without text, or a fraction out of range.
        """
        if not 0 <= held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be in [0, 1), got {held_out_fraction}")
        domains, remarks = [], list(notes)
        for name, (train, held_out) in split(documents, held_out_fraction).items():
            if not train:
                raise ValueError(f"domain {name!r} has no text of its own")
            held_bytes = sum(len(text.encode()) for text in held_out)
            all_bytes = held_bytes + sum(len(text.encode()) for text in train)
            if held_bytes < 0.8 * held_out_fraction * all_bytes:
                remarks.append(
                    f"{name}: {held_bytes} of {all_bytes} bytes held out, short of "
                    f"{held_out_fraction:.0%}: too few documents are unlike all others"
                )
            domains.append(Domain(name=name, train=tuple(train), held_out=tuple(held_out)))
        if not domains:
            raise ValueError("corpus has no domain: give at least one document")
        return cls(domains=tuple(domains), notes=tuple(remarks))


def merge(corpora: Sequence[Corpus]) -> Corpus:
    """One corpus of all documents, split anew so that held-out text overlaps no training text."""
    if len(corpora) == 1:
        return corpora[0]
    documents: dict[str, list[str]] = {}
    for domain in (domain for corpus in corpora for domain in corpus.domains):
        documents.setdefault(domain.name, []).extend([*domain.train, *domain.held_out])
    return Corpus.from_documents(documents, notes=(n for corpus in corpora for n in corpus.notes))


def load_corpus(paths: Sequence[str | Path]) -> Corpus:
    """Read text files, folders (recursively) and JSON-lines files.

    A domain is named by the "domain" field of a JSON line; else by the file's stem, where the
    file itself is named in `paths`; else by the folder directly inside the named one (or the
    named one, for files directly inside it). Hidden files and folders are skipped; in folders
    only `TEXT_SUFFIXES` are read. Files are UTF-8; line ends become a single newline.

    Args:
        paths: at least one file or folder.
    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no text at all, a file that is not UTF-8, or a JSON line without text; the
            message names the file and the line.
    """
    documents: dict[str, list[str]] = {}
    for path in map(Path, paths):
        for file, domain in _files_in(path):
            for name, text in _documents_in(file, domain):
                if text.strip():
                    documents.setdefault(name, []).append(text)
    if not documents:
        raise ValueError(f"no text in {[str(path) for path in paths]}: the corpus is empty")
    return Corpus.from_documents(dict(sorted(documents.items())))


def _files_in(path: Path) -> Iterator[tuple[Path, str]]:
    """Files under `path` in a fixed order, each with the name of its domain."""
    if path.is_file():
        yield path, path.stem
        return
    if not path.is_dir():
        raise FileNotFoundError(f"data path {str(path)!r} does not exist")
    for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).parts):
        parts = file.relative_to(path).parts
        hidden = any(part.startswith(".") for part in parts)
        if file.is_file() and not hidden and file.suffix.lower() in TEXT_SUFFIXES:
            yield file, parts[0] if len(parts) > 1 else path.resolve().name


def _documents_in(file: Path, domain: str) -> Iterator[tuple[str, str]]:
    text = read_text(file)
    if file.suffix.lower() != ".jsonl":
        yield domain, text
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_document(line, f"{str(file)!r} line {number}", domain)


def _json_document(line: str, where: str, domain: str) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where} has no text: it should be an object with a string in "text"')
    name = record.get("domain", domain)
    if not isinstance(name, str) or not name:
        raise ValueError(f'{where}: "domain" should be a non-empty string, got {name!r}')
    try:
        (name + text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds a lone surrogate, which is no text: {error}") from error
    return name, text


def read_text(file: Path) -> str:
    """A UTF-8 file's text, without a byte order mark, with single newlines.

    Raises:
        ValueError: the file is not UTF-8.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 text: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")
