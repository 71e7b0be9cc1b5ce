"""Six domains of text made from what is installed with the library anyway; no network."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import json
import logging
import os
import platform
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from etr.data.corpus import Corpus, Domain
from etr.data.reading import read_text
from etr.data.synthetic import synthesise
from etr.files import sha256, write_bytes
from etr.moe.notice import warn

log = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 2_000_000
"""Bytes of text per domain; the sources give about this much of each kind."""

_FORMAT = "etr-corpus-2"
_ENOUGH_BYTES = 250_000  # a domain with less than this, and less than its cap, is topped up
_DOC_PARTS = ("nn", "optim", "distributions", "distributed", "fx", "utils", "autograd", "sparse")
# A fixed list, so that installing something unrelated does not change the corpus.
_LICENSED = (
    "torch numpy sympy mpmath networkx jinja2 markupsafe filelock fsspec typing_extensions "
    "transformers tokenizers safetensors huggingface_hub regex packaging pyyaml tqdm pip setuptools"
)

File = tuple[str, Path]
"""A source file: a name that is the same on every machine, and where it is on this one."""


@dataclass(frozen=True)
class DomainSource:
    """Where a domain comes from."""

    description: str
    find: Callable[[], Iterable[File]]
    read: Callable[[str, str], Iterable[str]]
    """Documents in a file's (name, text)."""


def builtin_corpus(cache_dir: str | Path, max_bytes_per_domain: int = DEFAULT_MAX_BYTES) -> Corpus:
    """Domains python, cpp, docs, math, arithmetic and english, about equally large.

    Read from the standard library and from torch, numpy and sympy as installed, so the text
    differs between versions of those; `Corpus.notes` names them, and says where a source was
    missing and made-up text stands in. Source files are parsed, never executed. Building takes
    some seconds; the result is cached, keyed by the names and sizes of all source files.

    Args:
        cache_dir: folder for the cache, made if missing.
        max_bytes_per_domain: most UTF-8 bytes of training and held-out text per domain.
    Raises:
        ValueError: max_bytes_per_domain is under 10,000.
    """
    if max_bytes_per_domain < 10_000:
        raise ValueError(f"max_bytes_per_domain must be at least 10000, got {max_bytes_per_domain}")
    files = {name: sorted(source.find()) for name, source in SOURCES.items()}
    listing = [[d, name, path.stat().st_size] for d, found in files.items() for name, path in found]
    key = sha256(_FORMAT, json.dumps([listing, max_bytes_per_domain, _versions()]))
    path = Path(cache_dir) / f"corpus-{key[:32]}.json"
    cached = _read_cache(path)
    if cached is not None:
        return cached
    notes, documents = [f"built-in corpus from {_versions()}"], {}
    for name, found in files.items():
        log.info("collecting built-in text: %s", name)
        documents[name], remark = _collect(name, found, max_bytes_per_domain)
        notes += remark
    corpus = Corpus.from_documents(documents, notes=notes)
    _write_cache(path, corpus)
    return corpus


def _collect(domain: str, files: list[File], max_bytes: int) -> tuple[list[str], list[str]]:
    """A sample of whole documents up to `max_bytes`, and a note if some had to be made up."""
    documents: list[str] = []
    room = max_bytes
    # In the order of a hash: a sample across all folders, without reading every file.
    for name, path in sorted(files, key=lambda file: sha256(file[0])):
        if room <= max_bytes // 100:
            break
        for text in _read_documents(SOURCES[domain], name, path):
            size = len(text.encode())
            if size <= room and text.strip():
                documents.append(text)
                room -= size
    missing = min(max_bytes, _ENOUGH_BYTES) - (max_bytes - room)
    # Files that did not fit leave a remainder: only a real lack is worth made-up text.
    if missing <= min(max_bytes, _ENOUGH_BYTES) // 2:
        return documents, []
    made_up = synthesise(domain, missing)
    share = "all" if not documents else f"{missing} bytes"
    note = f"{domain}: {SOURCES[domain].description} not found in full; {share} of it is made up"
    return documents + made_up, [note]


def _read_documents(source: DomainSource, name: str, path: Path) -> list[str]:
    try:
        texts = list(source.read(name, read_text(path)))
    except (ValueError, SyntaxError, OSError, RecursionError):
        return []  # files that no reader of this kind can make sense of hold no documents
    # A string literal may hold lone surrogates, which are no text.
    return [text.encode(errors="ignore").decode() for text in texts]


# Readers -------------------------------------------------------------------------------------


def _whole(name: str, text: str) -> Iterator[str]:
    yield text


def _docstrings(name: str, text: str, least_characters: int = 200) -> Iterator[str]:
    """Docstrings worth reading, and the long literals of modules made of nothing else."""
    if '"""' not in text:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        tree = ast.parse(text)
    if name.endswith("_docs.py"):
        nodes = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        found: Iterable[object] = nodes
    else:
        found = _definition_docstrings(tree)
    for document in found:
        if isinstance(document, str) and len(document) >= least_characters:
            yield document.strip() + "\n"


def _definition_docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[str | None]:
    yield ast.get_docstring(node)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _definition_docstrings(child)


def _english(name: str, text: str) -> Iterator[str]:
    """Help topics, a package's description below its headers, or a licence."""
    if name.endswith("topics.py"):
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                yield from ast.literal_eval(node.value).values()
    elif name.endswith("METADATA"):
        yield text.partition("\n\n")[2]
    else:
        yield text


# Finders -------------------------------------------------------------------------------------


def _package(name: str) -> Path | None:
    """A top-level package's folder, without importing it."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _under(root: Path | None, pattern: str, skip: Iterable[str] = ()) -> Iterator[File]:
    """Files matching `pattern`, named relative to `root`, but for folders named in `skip`."""
    if root is None or not root.is_dir():
        return
    skipped = {"site-packages", "__pycache__", *skip}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped]
        for name in fnmatch.filter(names, pattern):
            path = Path(folder, name)
            if path.is_file():
                yield path.relative_to(root).as_posix(), path


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _find_python() -> Iterator[File]:
    # Without tests, and without folders of tables or of text that is a domain of its own.
    skip = ("test", "tests", "idle_test", "encodings", "pydoc_data")
    return _under(_standard_library(), "*.py", skip)


def _find_cpp() -> Iterator[File]:
    torch = _package("torch")
    # The thousands of generated operator headers all say the same.
    return _under(torch and torch / "include", "*.h", ("ops",))


def _find_docs() -> Iterator[File]:
    numpy, torch = _package("numpy"), _package("torch")
    for name, path in _under(numpy, "*.py", ("tests",)):
        yield f"numpy/{name}", path
    for part in _DOC_PARTS:
        for name, path in _under(torch and torch / part, "*.py"):
            yield f"torch/{part}/{name}", path
    for path in torch.glob("*.py") if torch else ():
        yield f"torch/{path.name}", path


def _find_math() -> Iterator[File]:
    yield from _under(_package("sympy"), "*.py", ("tests",))


def _find_arithmetic() -> Iterator[File]:
    return _under(_standard_library() / "test" / "decimaltestdata", "*.decTest")


def _find_english() -> Iterator[File]:
    yield from _under(_standard_library() / "pydoc_data", "topics.py")
    for package in _LICENSED.split():
        try:
            installed = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue
        # Not by `files`, which makes a path of each of the many thousand lines.
        for line in (installed.read_text("RECORD") or "").splitlines():
            info, in_info, name = line.partition(",")[0].partition(".dist-info/")
            last = name.rpartition("/")[2]
            wanted = any(word in last.upper() for word in ("LICEN", "COPYING", "NOTICE"))
            if not in_info or "/" in info or not (wanted or last == "METADATA"):
                continue
            path = Path(str(installed.locate_file(f"{info}.dist-info/{name}")))
            if path.is_file():
                yield f"{package}/{name}", path


SOURCES: dict[str, DomainSource] = {
    "python": DomainSource("the standard library's source", _find_python, _whole),
    "cpp": DomainSource("torch's C++ headers", _find_cpp, _whole),
    "docs": DomainSource("docstrings of torch and numpy", _find_docs, _docstrings),
    "math": DomainSource("sympy's docstrings", _find_math, _docstrings),
    "arithmetic": DomainSource("the standard library's decimal tests", _find_arithmetic, _whole),
    "english": DomainSource(
        "help topics, package descriptions and licences", _find_english, _english
    ),
}
"""The built-in domains, in order."""


# Cache ---------------------------------------------------------------------------------------


def _versions() -> str:
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "numpy", "sympy"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return ", ".join(versions)


def _write_cache(path: Path, corpus: Corpus) -> None:
    payload = json.dumps(asdict(corpus), ensure_ascii=False).encode()
    header = json.dumps({"format": _FORMAT, "sha256": sha256(payload)}).encode()
    write_bytes(path, header + b"\n" + payload)


def _read_cache(path: Path) -> Corpus | None:
    """The cached corpus; None where there is none, and a warning where it is damaged."""
    if not path.exists():
        return None
    header, _, payload = path.read_bytes().partition(b"\n")
    if header != json.dumps({"format": _FORMAT, "sha256": sha256(payload)}).encode():
        warn(f"corpus cache {path.name} is damaged; building it again")
        return None
    content = json.loads(payload)
    domains = tuple(
        Domain(name=d["name"], train=tuple(d["train"]), held_out=tuple(d["held_out"]))
        for d in content["domains"]
    )
    return Corpus(domains=domains, notes=tuple(content["notes"]))
