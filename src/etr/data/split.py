"""Which documents are held out: chosen by content, and unlike anything that is trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

HELD_OUT_FRACTION = 0.05
"""Share of each domain's bytes that is held out, more where that is too few documents."""

ENOUGH_DOCUMENTS, MOST_TIMES = 20, 3
"""Documents that are held out where up to so many times the share of bytes allows it."""

MAX_SHARED = 0.2
"""Largest share of a held-out document's shingles that any other document may contain."""

_SHINGLE_BYTES = 50
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, hence invertible modulo 2**64
_BASE_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def shingles(text: str) -> NDArray[np.uint64]:
    """Hashes of about a quarter of the text's 50-byte windows, white space collapsed.

    Which windows are kept depends on their content alone, so two documents that share a
    passage keep the same ones. Sorted, without repeats; empty for text under 50 bytes.
    """
    data = np.frombuffer(" ".join(text.split()).encode(), dtype=np.uint8).astype(np.uint64)
    if len(data) < _SHINGLE_BYTES:
        return np.empty(0, dtype=np.uint64)
    # Polynomial hash of every window from prefix sums of byte * base**i, all modulo 2**64.
    prefix = np.zeros(len(data) + 1, dtype=np.uint64)
    np.cumsum(data * _powers(_BASE, len(data)), out=prefix[1:])
    sums = prefix[_SHINGLE_BYTES:] - prefix[:-_SHINGLE_BYTES]
    hashes = sums * _powers(_BASE_INVERSE, len(sums)) * _MIX
    return np.unique(hashes[hashes >> np.uint64(62) == 0])


def _powers(base: np.uint64, length: int) -> NDArray[np.uint64]:
    powers = np.full(length, base, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def cut(documents: Sequence[str]) -> list[str]:
    """Cut documents that dominate their domain, so that there is something to hold out.

    A document longer than 1/20 of the domain is cut at line ends into pieces of about 1/64 of
    it (at least 512 characters); shorter ones stay whole.
    """
    total = sum(map(len, documents))
    size = max(total // 64, 512)
    pieces: list[str] = []
    for document in documents:
        whole = len(document) <= max(total // 20, size)
        pieces.extend([document] if whole else _pieces(document, size))
    return [piece for piece in pieces if piece.strip()]


def _pieces(text: str, size: int) -> list[str]:
    pieces, start = [], 0
    while len(text) - start > size:
        end = text.rfind("\n", start + size // 2, start + size) + 1 or start + size
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def split(
    documents: Mapping[str, Sequence[str]], fraction: float = HELD_OUT_FRACTION
) -> dict[str, tuple[list[str], list[str]]]:
    """Split each domain into training and held-out documents.

    Documents repeated exactly, in any domain, are kept once. In the order of their SHA-256,
    documents that share at most `MAX_SHARED` of their shingles with all others together are
    held out until `fraction` of the domain's bytes is reached, and on to `ENOUGH_DOCUMENTS` of
    them or `MOST_TIMES` those bytes, whichever comes first: a loss on a few long documents says
    little of others. The choice depends on content alone, and near duplicates (licences,
    boilerplate) always train. Documents under 50 bytes are never held out, and one document
    always remains for training.

    Args:
        documents: texts of each domain.
        fraction: share of a domain's UTF-8 bytes to hold out, in [0, 1).
    Returns:
        For each domain its training documents, in their order, and its held-out ones, in the
        order of their hash (a prefix of them is a fair sample).
    """
    seen: set[bytes] = set()
    domains: dict[str, list[tuple[bytes, str]]] = {}
    for name, texts in documents.items():
        kept = domains.setdefault(name, [])
        for text in cut(texts):
            key = hashlib.sha256(text.encode()).digest()
            if key not in seen:
                seen.add(key)
                kept.append((key, text))
    prints = {key: shingles(text) for kept in domains.values() for key, text in kept}
    shared = _in_several(list(prints.values()))
    return {name: _split_domain(kept, prints, shared, fraction) for name, kept in domains.items()}


def _in_several(prints: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """Shingles, sorted, that two or more documents have."""
    if not prints:
        return np.empty(0, dtype=np.uint64)
    values, counts = np.unique(np.concatenate(prints), return_counts=True)
    return values[counts > 1]


def _split_domain(
    kept: Sequence[tuple[bytes, str]],
    prints: Mapping[bytes, NDArray[np.uint64]],
    shared: NDArray[np.uint64],
    fraction: float,
) -> tuple[list[str], list[str]]:
    sizes = {key: len(text.encode()) for key, text in kept}
    target = fraction * sum(sizes.values())
    held: dict[bytes, str] = {}
    num_bytes = 0
    for key, text in sorted(kept):
        enough = len(held) >= ENOUGH_DOCUMENTS or num_bytes >= MOST_TIMES * target
        if (num_bytes >= target and enough) or len(held) + 1 >= len(kept):
            break
        own = prints[key]
        if len(own) and np.isin(own, shared, assume_unique=True).mean() <= MAX_SHARED:
            held[key] = text
            num_bytes += sizes[key]
    return [text for key, text in kept if key not in held], list(held.values())
