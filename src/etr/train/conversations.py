"""Conversations to learn from: read from JSON lines, and turned into tokens and labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etr.data import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
FORMATS = (
    '{"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": ..., "completion": ...} or '
    '{"instruction": ..., "input": ..., "output": ...}'
)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn."""

    role: str
    """system, user or assistant."""
    content: str
    """Its text."""


def read_conversations(path: str | Path) -> list[list[Message]]:
    """Read conversations, one JSON object a line; empty lines are skipped.

    Args:
        path: lines of one of `FORMATS`; "input" may be left out.
    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no conversation, named by its number, or no line at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data={str(path)!r} is no file; give a file of JSON lines")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(_conversation(json.loads(line.decode())))
        except ValueError as error:  # of the JSON, its encoding, or what it holds
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path} holds no conversation; each line must be {FORMATS}")
    return found


def encode(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[dict[str, list[int]]]:
    """Tokens, and labels that are `IGNORED` outside the assistant's turns.

    The tokenizer's chat template writes the turns, and tokens end where answers begin, as they do
    when a model answers; one without a template gets plain text,
    ``User: ...``, ``Assistant: ...`` and an end-of-text token after each answer. Conversations are
    cut at the end, and left out if no label is left.

    Args:
        conversations: of `read_conversations`.
        tokenizer: the model's own.
        max_length: most tokens of a conversation.
    Raises:
        ValueError: the chat template refuses a conversation, or writes an answer otherwise once
            more turns follow.
    """
    write = _by_template if getattr(tokenizer, "chat_template", None) else _plainly
    rows = []
    for number, messages in enumerate(conversations, start=1):
        try:
            ids, labels = write(messages, tokenizer)
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"conversation {number} cannot be written: {error}") from error
        ids, labels = ids[:max_length], labels[:max_length]
        if any(label != IGNORED for label in labels[1:]):  # the first token is never predicted
            rows.append({"input_ids": ids, "labels": labels})
    return rows


def _conversation(values: Any) -> list[Message]:
    if not isinstance(values, dict):
        raise ValueError(f"must be a JSON object: {FORMATS}")
    if "messages" in values:
        return _messages(values["messages"])
    if "prompt" in values or "completion" in values:
        return [
            Message(role="user", content=_text(values, "prompt")),
            Message(role="assistant", content=_text(values, "completion")),
        ]
    if "instruction" in values or "output" in values:
        question = _text(values, "instruction")
        if values.get("input"):
            question = f"{question}\n\n{_text(values, 'input')}"
        return [
            Message(role="user", content=question),
            Message(role="assistant", content=_text(values, "output")),
        ]
    raise ValueError(f"has the keys {', '.join(sorted(values)) or 'none'}; must be {FORMATS}")


def _messages(values: Any) -> list[Message]:
    if not isinstance(values, list) or not values:
        raise ValueError("'messages' must be a list of turns")
    found = []
    for turn in values:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise ValueError(f"every turn needs a 'role', one of {', '.join(ROLES)}; got {turn!r}")
        found.append(Message(role=turn["role"], content=_text(turn, "content")))
    if all(message.role != "assistant" for message in found):
        raise ValueError("'messages' has no turn of the assistant, so there is nothing to learn")
    return found


def _text(values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key!r} must be a text that is not empty; got {value!r}")
    return value


def _by_template(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    turns = [{"role": m.role, "content": m.content} for m in messages]

    def write(count: int, prompt: bool, *, tokenize: bool) -> Any:
        return tokenizer.apply_chat_template(
            turns[:count], tokenize=tokenize, return_dict=False, add_generation_prompt=prompt
        )

    spans = _answers(messages, partial(write, tokenize=True))
    if spans is not None:
        ids = list(write(len(turns), False, tokenize=True))
        labels = [IGNORED] * len(ids)
        for begin, end in spans:
            labels[begin:end] = ids[begin:end]
        return ids, labels
    # A token may reach over the place where an answer begins, such as a line break and spaces
    # after it. In use the model goes on from whole tokens of what comes before: cut there.
    spans = _answers(messages, partial(write, tokenize=False))
    if spans is None:
        raise ValueError("its chat template writes a turn otherwise once others follow")
    text = write(len(turns), False, tokenize=False)
    cuts = [0, *(place for span in spans for place in span), len(text)]
    pieces = [
        (list(tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]), number % 2 == 1)
        for number, (begin, end) in enumerate(pairwise(cuts))
    ]
    ids = [token for piece, _ in pieces for token in piece]
    labels = [token if learned else IGNORED for piece, learned in pieces for token in piece]
    return ids, labels


def _answers(
    messages: Sequence[Message], write: Callable[[int, bool], Any]
) -> list[tuple[int, int]] | None:
    """Where the assistant's turns begin and end in what `write` makes of all turns, text or tokens.

    None where what comes before an answer, or the answer, changes once more follows.
    """
    whole, spans = write(len(messages), False), []
    for place, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = write(place, True) if place else whole[:0]
        after = write(place + 1, False)
        if whole[: len(after)] != after or after[: len(before)] != before:
            return None
        spans.append((len(before), len(after)))
    return spans


def _plainly(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        learned = message.role == "assistant"
        name = f"{message.role.capitalize()}: "
        pieces = [(name, False), (message.content, learned), ("\n", False)]
        for text, counts in pieces:
            piece = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if counts and tokenizer.eos_token_id is not None:
                piece.append(tokenizer.eos_token_id)
            ids += piece
            labels += piece if counts else [IGNORED] * len(piece)
    return ids, labels
