"""Routed text: from a trace to coloured tokens."""

from pathlib import Path

import pytest
from invented_rows import DOMAINS, TEXT, write_trace

from etr.report import draw_figures
from etr.report.chart import Drawing, Skipped
from etr.report.routed import Piece, merge, read_routed, turn


def _pieces(*entries: tuple[str, int, bool]) -> list[Piece]:
    return [Piece(text=text, expert=expert, kept=kept) for text, expert, kept in entries]


def test_neighbours_that_fared_alike_are_joined() -> None:
    tokens = _pieces(("a", 1, True), ("b", 1, True), ("c", 1, False), ("d", 1, True))
    assert merge(tokens) == tuple(
        _pieces(("ab", 1, True), ("c", 1, False), ("d", 1, True)),
    )
    assert merge([]) == ()


@pytest.mark.parametrize(("layers", "shown"), [(1, [0]), (2, [0, 1]), (4, [0, 3])])
def test_the_first_and_last_layer_of_each_domain_are_read(
    tmp_path: Path, layers: int, shown: list[int]
) -> None:
    routed = read_routed(write_trace(tmp_path, layers=layers))
    assert [text.layer for text in routed.texts] == [i for i in shown for _ in DOMAINS]
    assert [text.domain for text in routed.texts] == [*DOMAINS] * len(shown)
    for text in routed.texts:
        assert "".join(piece.text for piece in text.pieces) == TEXT[:240]
    first = routed.texts[0].pieces
    # Four tokens each of expert 0 and 1, every fifth dropped.
    assert first[:3] == tuple(_pieces(("def ", 0, True), ("m", 1, False), ("ean", 1, True)))


def test_a_token_with_several_experts_is_dropped_when_all_drop_it(tmp_path: Path) -> None:
    routed = read_routed(write_trace(tmp_path, layers=1, top_k=2))
    first = routed.texts[0].pieces[0]
    # Tokens 0 and 1 chose expert 0 twice; token 4, both of whose experts drop, is the fifth.
    assert first == Piece(text="de", expert=0, kept=True)
    dropped = [piece for piece in routed.texts[0].pieces if not piece.kept]
    assert dropped[0].text == TEXT[4]


@pytest.mark.parametrize("experts", [1, 8, 12, 13, 64])
def test_experts_differ_in_colour(experts: int) -> None:
    hues = [turn(experts) * expert % 360 for expert in range(experts)]
    assert len({round(hue, 1) for hue in hues}) == experts


@pytest.mark.parametrize(
    ("damage", "reason"), [("text", "the trace has no text"), ("cut", "cut short"), ("", "")]
)
def test_a_trace_that_cannot_be_shown_is_a_reason(tmp_path: Path, damage: str, reason: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    path = write_trace(tmp_path, text=damage != "text")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    (figure,) = [f for f in draw_figures([tmp_path]) if f.key == "routed-text"]
    if reason:
        assert isinstance(figure, Skipped)
        assert reason in figure.reason
    else:
        assert isinstance(figure, Drawing)
        assert figure.html is not None
        assert "<s style=--e:1>m</s>" in figure.html
        assert "<i style=--e:0>def </i>" in figure.html
        assert 'style="--turn:45"' in figure.html


def test_markup_in_a_text_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr("invented_rows.TEXT", "<b>&\x07")
    write_trace(tmp_path)
    (figure,) = [f for f in draw_figures([tmp_path]) if f.key == "routed-text"]
    assert isinstance(figure, Drawing)
    assert figure.html is not None
    assert "&lt;b&gt;" in figure.html
    assert "\x07" not in figure.html
