"""A corpus: named domains, each with documents to train on and documents held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from etr.data.conversations import format_of
from etr.data.reading import READERS, read_rows, read_text, suffix_of
from etr.data.split import HELD_OUT_FRACTION, split
from etr.files import sha256
from etr.moe.notice import warn

TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".py", ".json", *READERS})
"""Suffixes read from a folder, also before .gz; a file named itself is read whatever its suffix."""
NAMED = 3
"""Most files that a warning names."""


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
    """Read text files, folders (recursively), and files of records with a text each.

    A domain is named by the "domain" field of a record; else by the file's stem, where the file
    itself is named in `paths`; else by the folder directly inside the named one (or the named one,
    for files directly inside it). Hidden files and folders are skipped; of a folder's other files
    those of `TEXT_SUFFIXES` are read, also as .gz, and a warning counts and names the rest. See
    `etr.data.reading` for encodings; line ends become a single newline.

    Args:
        paths: at least one file or folder.
    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no text at all or in a file that is named itself, a file that cannot be read,
            or a record without text; the message names the file and the line or row.
    """
    documents: dict[str, list[str]] = {}
    notes: list[str] = []
    for path in map(Path, paths):
        files, others = _files_in(path)
        empty = []
        for file, domain in files:
            texts = [pair for pair in _documents_in(file, domain) if pair[1].strip()]
            for name, text in texts:
                documents.setdefault(name, []).append(text)
            if not texts:
                empty.append(file)
        if path.is_file() and empty:
            raise ValueError(f"{path} holds no text")
        notes += _left_out(path, others, empty)
    if not documents:
        found = "".join(f"; {note}" for note in notes)
        raise ValueError(f"no text in {[str(path) for path in paths]}: the corpus is empty{found}")
    for note in notes:
        warn(note)
    return Corpus.from_documents(dict(sorted(documents.items())), notes=notes)


def _files_in(path: Path) -> tuple[list[tuple[Path, str]], list[Path]]:
    """Files under `path` in a fixed order, each with the name of its domain; and those not read."""
    if path.is_file():
        return [(path, _stem(path))], []
    if not path.is_dir():
        raise FileNotFoundError(f"data path {str(path)!r} does not exist")
    files, others = [], []
    for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).parts):
        parts = file.relative_to(path).parts
        if any(part.startswith(".") for part in parts) or not file.is_file():
            continue
        if suffix_of(file) in TEXT_SUFFIXES:
            files.append((file, parts[0] if len(parts) > 1 else path.resolve().name))
        else:
            others.append(file)
    return files, others


def _stem(file: Path) -> str:
    return Path(file.stem).stem if file.suffix.lower() == ".gz" else file.stem


def _left_out(path: Path, others: list[Path], empty: list[Path]) -> list[str]:
    """What of a folder was not read, in words."""
    found = [
        f"{len(files)} {why} ({', '.join(str(file.relative_to(path)) for file in files[:NAMED])}"
        f"{', ...' if len(files) > NAMED else ''})"
        for files, why in ((others, "of another kind"), (empty, "without text"))
        if files
    ]
    return [f"{path}: files left out: {', '.join(found)}"] if found else []


def _documents_in(file: Path, domain: str) -> Iterator[tuple[str, str]]:
    if suffix_of(file) in READERS or (suffix_of(file) == ".json" and _holds_records(file)):
        for where, record in read_rows(file):
            yield _document(record, where, domain)
    else:
        yield domain, read_text(file)


def _holds_records(file: Path) -> bool:
    """Whether a .json file holds records with a text, or an array of conversations.

    Any other is a text itself, as a file of settings beside code is.
    """
    try:
        where, first = next(read_rows(file))
    except (StopIteration, ValueError):
        return False
    if isinstance(first, dict) and isinstance(first.get("text"), str):
        return True
    return where.endswith("row 1") and format_of(first) is not None


def _document(record: Any, where: str, domain: str) -> tuple[str, str]:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        form = format_of(record)
        other = f"; it looks like {form.name}, for `etr sft`" if form and form.read else ""
        raise ValueError(f'{where}: no text; it should be an object with a string in "text"{other}')
    name = record.get("domain")
    name = domain if name is None else name
    if not isinstance(name, str) or not name:
        raise ValueError(f'{where}: "domain" should be a non-empty string, got {name!r}')
    return name, text
