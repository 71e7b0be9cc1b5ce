"""Tokenizers: exact round trips, fast path equal to the slow one, saved and loaded offline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from bos_tokenizer import BOS, EOS, bos_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from etr.data import (
    BYTE_VOCAB_SIZE,
    byte_tokenizer,
    encode_documents,
    encode_prompt,
    load_tokenizer,
    train_bpe,
)
from etr.data.tokenizer import fingerprint, text_start

BYTE = byte_tokenizer()
TEXTS = ["the cat sat on the mat <eos> the end", "été 日本 the 😀 cat"] * 20
BPE = train_bpe(TEXTS, 300)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
TRICKY = ["", " a , b .", "a  \n\t b", "<eos><pad> <unused_0>", "\x00\x7f\x80ÿ", "e\u0301", "🏳️‍🌈"]


@given(ANY_TEXT)
def test_byte_ids_are_the_bytes(text: str) -> None:
    ids = BYTE.encode(text)
    assert ids == list(text.encode())
    assert BYTE.decode(ids) == text


@given(ANY_TEXT)
def test_bpe_round_trip(text: str) -> None:
    (ids,) = encode_documents(BPE, [text])
    assert BPE.decode(ids.tolist()) == text


@pytest.mark.parametrize("text", TRICKY)
@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
def test_tricky_round_trip(tokenizer: object, text: str) -> None:
    ids = tokenizer.encode(text)  # type: ignore[attr-defined]
    assert tokenizer.decode(ids) == text  # type: ignore[attr-defined]
    assert tokenizer.eos_token_id not in ids  # type: ignore[attr-defined]


def test_fast_path_is_the_tokenizers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = encode_documents(BYTE, TRICKY)
    monkeypatch.setattr("etr.data.tokenizer.fingerprint", lambda tokenizer: str(id(tokenizer)))
    slow = encode_documents(BYTE, TRICKY)
    assert all(ids.dtype == np.int64 for ids in fast + slow)
    assert [ids.tolist() for ids in fast] == [ids.tolist() for ids in slow]


def test_byte_vocabulary() -> None:
    assert len(BYTE) == BYTE_VOCAB_SIZE
    assert BYTE_VOCAB_SIZE % 8 == 0
    assert (BYTE.pad_token_id, BYTE.bos_token_id, BYTE.eos_token_id) == (256, 257, 258)
    assert BYTE.decode([104, 105, 258, 256], skip_special_tokens=True) == "hi"


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
def test_saved_and_loaded(tmp_path: Path, tokenizer: object) -> None:
    tokenizer.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    loaded = load_tokenizer(tmp_path)
    assert fingerprint(loaded) == fingerprint(tokenizer)  # type: ignore[arg-type]
    assert len(loaded) == len(tokenizer)  # type: ignore[arg-type]
    for text in TRICKY:
        assert loaded.encode(text) == tokenizer.encode(text)  # type: ignore[attr-defined]
        assert loaded.decode(loaded.encode(text)) == text


def test_bpe_compresses_and_leaves_specials_alone() -> None:
    assert len(BPE) <= 300
    assert (BPE.pad_token_id, BPE.bos_token_id, BPE.eos_token_id) == (0, 1, 2)
    (ids,) = encode_documents(BPE, ["the cat sat on the mat"])
    assert len(ids) < 12
    assert fingerprint(BPE) != fingerprint(BYTE)


def test_fingerprint_ignores_padding_settings() -> None:
    before = fingerprint(BYTE)
    BYTE(["a", "bcd"], padding=True)
    assert fingerprint(BYTE) == before


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 259, got 100"):
        train_bpe(TEXTS, 100)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    bare = train_bpe(TEXTS, 259)
    bare.eos_token = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no eos_token"):
        load_tokenizer(tmp_path / "bare")


def test_no_documents() -> None:
    assert encode_documents(BYTE, []) == []


@pytest.mark.parametrize(
    ("single", "start"),
    [
        ("$A", []),
        ("<bos> $A", [BOS]),
        ("<bos> $A <eos>", [BOS]),
        ("$A <eos>", []),
        ("<eos> $A", [EOS]),
        ("<bos> <eos> $A", [BOS, EOS]),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_texts_begin_as_the_tokenizer_begins_them(
    single: str, start: list[int], saved: bool, tmp_path: Path
) -> None:
    tokenizer = bos_tokenizer(single)
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
    assert text_start(tokenizer) == start
    own = tokenizer("hi")["input_ids"]
    assert encode_prompt(tokenizer, "hi") == [*start, 104, 105]
    assert own[: len(start) + 2] == [*start, 104, 105]
    assert encode_prompt(tokenizer, "") == (start or [EOS])
    assert encode_documents(tokenizer, ["hi"])[0].tolist() == [104, 105]


def test_llama_tokenizers_begin_texts(tmp_path: Path) -> None:
    from transformers import LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", "\u2581", "h", "i"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    LlamaTokenizer(vocab=vocab, merges=[], add_bos_token=True).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert encode_prompt(tokenizer, "hi") == tokenizer("hi")["input_ids"] == [1, 3, 4, 5]


@pytest.mark.parametrize(("single", "start"), [("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A", [])])
def test_a_tokenizer_that_knows_no_letter_begins_texts_too(single: str, start: list[int]) -> None:
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "7": 2}, merges=[]))
    specials = [("<s>", 0), ("</s>", 1)]
    words.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == []
    assert text_start(tokenizer) == start
    assert encode_prompt(tokenizer, "7") == [*start, 2]


def test_a_prompt_that_says_bos_itself_has_it_once() -> None:
    tokenizer = bos_tokenizer()
    tokenizer.split_special_tokens = False
    assert tokenizer("<bos>hi")["input_ids"] == [BOS, BOS, 104, 105]
    assert encode_prompt(tokenizer, "<bos>hi") == [BOS, 104, 105]
