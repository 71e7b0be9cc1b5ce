"""Routed text from a trace: which expert took each token, and which tokens nobody took."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

MOST_TEXTS = 3
MOST_TOKENS = 160


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive tokens that fared alike."""

    text: str
    """Their text."""
    expert: int | None
    """The best expert that kept them, or that they wanted where none kept them."""
    kept: bool
    """Whether any expert kept them."""


@dataclass(frozen=True, kw_only=True)
class RoutedText:
    """The start of one text as one layer routed it."""

    domain: str
    """Where the text is from."""
    layer: int
    """MoE layer, from the input."""
    pieces: tuple[Piece, ...]
    """The text in order."""


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What a page shows of one trace."""

    num_experts: int
    """Experts in a layer."""
    num_layers: int
    """MoE layers."""
    selection: str
    """How experts selected: threshold, dropless or batch."""
    texts: tuple[RoutedText, ...]
    """Layer after layer, the same texts in each."""


def read_routed(path: Path) -> Routed:
    """The first text of some domains, at the first and the last MoE layer.

    Raises:
        ValueError: pyarrow is not installed, or the file is damaged, no trace, or has no text.
    """
    try:
        from etr.trace import read_trace
    except ImportError as error:
        raise ValueError(f"reading a trace needs pyarrow ({error.name} is not installed)") from None
    trace = read_trace(path)
    layers = sorted({0, trace.info.num_layers - 1})
    texts = tuple(text for layer in layers for text in _texts(_rows(trace, layer), layer))
    if not texts:
        raise ValueError("the trace has no text")
    return Routed(
        num_experts=trace.info.num_experts,
        num_layers=trace.info.num_layers,
        selection=trace.info.selection,
        texts=texts,
    )


_COLUMNS = ["sequence", "text", "domain", "experts", "kept"]


def _rows(trace: Any, layer: int) -> Any:
    """Rows of a layer, of a text that was written in steps those of its finished blocks alone."""
    rows = trace.rows(layer)
    if "step" in trace.info.columns:
        import pyarrow.compute as pc

        rows = rows.filter(pc.less(rows["step"], 0))
    return rows.select(_COLUMNS)


def _texts(rows: Any, layer: int) -> Iterator[RoutedText]:
    """The first sequence of each of the first domains."""
    sequences = rows["sequence"].to_numpy()
    shown: set[str] = set()
    start = 0
    while start < len(sequences) and len(shown) < MOST_TEXTS:
        end = start + int((sequences[start:] != sequences[start]).argmax())
        end = end if end > start else len(sequences)
        first = rows.slice(start, min(end - start, MOST_TOKENS)).to_pylist()
        domain = str(first[0]["domain"])
        if domain not in shown and all(token["text"] is not None for token in first):
            shown.add(domain)
            yield RoutedText(domain=domain, layer=layer, pieces=merge([_piece(t) for t in first]))
        start = end


def _piece(token: dict[str, Any]) -> Piece:
    experts, kept = token["experts"], token["kept"]
    takers = [expert for expert, took in zip(experts, kept, strict=True) if took]
    wanted = takers or experts
    return Piece(text=token["text"], expert=wanted[0] if wanted else None, kept=bool(takers))


def merge(tokens: Sequence[Piece]) -> tuple[Piece, ...]:
    """Join neighbours that fared alike."""
    return tuple(
        Piece(text="".join(piece.text for piece in group), expert=expert, kept=kept)
        for (expert, kept), group in groupby(tokens, key=lambda piece: (piece.expert, piece.kept))
    )


def turn(num_experts: int) -> float:
    """Between the hues of one expert and the next, degrees: evenly apart where they are few."""
    return 360 / num_experts if num_experts <= 12 else 137.508
