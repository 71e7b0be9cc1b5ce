"""Held-out documents: chosen by content, unlike anything trained on."""

from __future__ import annotations

import random

import pytest

from etr.data.split import MAX_SHARED, cut, shingles, split


def prose(seed: int, num_words: int = 120) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(num_words))


@pytest.fixture
def documents() -> list[str]:
    return [prose(seed) for seed in range(200)]


def test_share_and_partition(documents: list[str]) -> None:
    train, held_out = split({"a": documents})["a"]
    assert sorted(train + held_out) == sorted(documents)
    assert 0.1 <= sum(map(len, held_out)) / sum(map(len, documents)) < 0.11


@pytest.mark.parametrize(("count", "expected"), [(30, 5), (200, 20), (600, 30)])
def test_few_documents_are_more_than_their_share(count: int, expected: int) -> None:
    held_out = split({"a": [prose(seed) for seed in range(count)]})["a"][1]
    assert len(held_out) == expected  # 3 times 5 % of the bytes, enough documents, 5 % of the bytes


def test_choice_depends_on_content_not_order(documents: list[str]) -> None:
    forwards, backwards = split({"a": documents})["a"], split({"a": documents[::-1]})["a"]
    assert forwards[1] == backwards[1]
    assert forwards[0] == backwards[0][::-1]


def test_exact_duplicates_kept_once_across_domains(documents: list[str]) -> None:
    parts = split({"a": documents, "b": [*documents[:50], *(prose(s) for s in range(300, 400))]})
    everything = [text for train, held in parts.values() for text in train + held]
    assert len(everything) == len(set(everything)) == 300


def test_near_duplicates_are_never_held_out(documents: list[str]) -> None:
    licence = prose(999)
    copies = [f"Copyright {year} {licence}" for year in range(1900, 2100)]
    train, held_out = split({"a": documents + copies})["a"]
    assert held_out
    assert not set(copies) & set(held_out)
    assert set(copies) <= set(train)


def test_held_out_shares_little_with_training(documents: list[str]) -> None:
    mixed = [f"{text} {documents[i // 2][: 60 * (i % 9)]}" for i, text in enumerate(documents)]
    train, held_out = split({"a": mixed}, 0.2)["a"]
    seen = {text[i : i + 50] for text in train for i in range(len(text) - 49)}
    assert held_out
    for text in held_out:
        windows = [text[i : i + 50] for i in range(len(text) - 49)]
        # Shingles are a sample of the windows, hence the margin.
        assert sum(window in seen for window in windows) / len(windows) <= MAX_SHARED + 0.1


def test_shingles_follow_content_not_place() -> None:
    text = prose(1, 400)
    inside = shingles(prose(2) + "\n\n" + text.replace(" ", "\n  ") + " " + prose(3))
    own = shingles(text)
    assert len(own) > 400
    assert set(own.tolist()) <= set(inside.tolist())
    assert not set(own.tolist()) & set(shingles(prose(4, 400)).tolist())


def test_shingles_of_repeated_text() -> None:
    text = prose(5, 60)
    same = shingles(text + " " + text)  # every window of text again, and those across the seam
    assert set(shingles(text).tolist()) <= set(same.tolist())
    assert len(same) < len(shingles(text)) + 51
    assert len(shingles("short")) == 0


def test_cut_leaves_small_documents_and_cuts_large_ones() -> None:
    small, large = "tiny\n", "".join(f"line {i} of a long text\n" for i in range(5000))
    pieces = cut([small, large])
    assert pieces[0] == small
    assert "".join(pieces[1:]) == large
    assert len(pieces) > 50
    assert all(piece.endswith("\n") for piece in pieces)


def test_cut_without_line_ends() -> None:
    pieces = cut(["x" * 5000])
    assert "".join(pieces) == "x" * 5000
    assert max(map(len, pieces)) == 512


def test_one_document_always_trains() -> None:
    assert split({"a": ["only one, " + prose(1, 20)]})["a"][1] == []
