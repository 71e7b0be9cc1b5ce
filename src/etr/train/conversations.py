"""Conversations as tokens and labels: what a model sees, and what of it is learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from etr.data import IGNORED
from etr.data.chat import ChatTemplate
from etr.data.conversations import Conversation, Message, read_conversations
from etr.data.tokenizer import text_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Conversation", "Message", "encode", "read_conversations"]

Ids = list[int]
Text = TypeVar("Text", str, Ids)
Written = tuple[Ids, Ids]
"""Tokens and labels of a conversation."""


def encode(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[dict[str, list[int]]]:
    """Tokens, and labels that are `IGNORED` outside the assistant's turns.

    The tokenizer's chat template writes the turns, beginning of text and all, and tokens end where
    answers begin, as they do when a model answers; one without a template gets plain text,
    ``User: ...``, ``Assistant: ...`` and an end-of-text token after each answer, begun as the
    tokenizer begins texts. Conversations are cut at the end, and left out if no label is left.

    Args:
        conversations: of `read_conversations`.
        tokenizer: the model's own.
        max_length: most tokens of a conversation.
    Raises:
        ValueError: the chat template fails, does not end, refuses a conversation, leaves out its
            tools, or writes an answer otherwise once more turns follow; or there are tools and no
            template.
    """
    if not getattr(tokenizer, "chat_template", None):
        return _rows(conversations, lambda turns: _plainly(turns, tokenizer), max_length)
    with ChatTemplate(tokenizer) as template:
        return _rows(
            conversations, lambda turns: _by_template(turns, tokenizer, template), max_length
        )


def _rows(
    conversations: Sequence[Sequence[Message]],
    write: Callable[[Sequence[Message]], Written],
    max_length: int,
) -> list[dict[str, list[int]]]:
    rows = []
    for number, turns in enumerate(conversations, start=1):
        try:
            ids, labels = write(turns)
        except ValueError as error:
            where = getattr(turns, "where", "")
            name = f"{where}: the conversation" if where else f"conversation {number}"
            raise ValueError(f"{name} cannot be written: {error}") from error
        ids, labels = ids[:max_length], labels[:max_length]
        if any(label != IGNORED for label in labels[1:]):  # the first token is never predicted
            rows.append({"input_ids": ids, "labels": labels})
    return rows


def _by_template(
    turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate
) -> Written:
    text, answers = _texts(turns, template)
    learned = [turn.learned for turn in turns if turn.role == "assistant"]
    ids = _tokens(tokenizer, text)
    spans = _spans(ids, [(_tokens(tokenizer, a), _tokens(tokenizer, b)) for a, b in answers])
    if spans is not None:
        return _joined(_pieces(ids, spans, learned))
    # A token may reach over the place where an answer begins, such as a line break and spaces
    # after it. In use the model goes on from whole tokens of what comes before: cut there.
    spans = _spans(text, answers)
    if spans is None:
        raise ValueError("its chat template writes a turn otherwise once others follow")
    return _joined(
        (_tokens(tokenizer, piece), counts) for piece, counts in _pieces(text, spans, learned)
    )


def _texts(turns: Sequence[Message], template: ChatTemplate) -> tuple[str, list[tuple[str, str]]]:
    """The whole conversation, and for each answer the text up to its beginning and its end."""
    written = [{**turn.fields, "role": turn.role, "content": turn.content} for turn in turns]
    tools = getattr(turns, "tools", None)
    places = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    chats = [(written, {"add_generation_prompt": False})]
    for place in places:
        if place:
            chats.append((written[:place], {"add_generation_prompt": True}))
        chats.append((written[: place + 1], {"add_generation_prompt": False}))
    # Many templates pass over what they do not know: here results of tools would be seen to change.
    other = [{**turn, "content": "?"} if turn["role"] == "tool" else turn for turn in written]
    changed, whole, *rest = template.write([(other, {}), *chats], tools)
    if other != written and changed == whole:
        raise ValueError("its chat template leaves out the turns of tools")
    for name in _tool_names(turns, tools):
        if name not in whole:
            raise ValueError(f"its chat template leaves out the tool {name!r}")
    if places and places[0] == 0:
        rest.insert(0, "")
    return whole, list(zip(rest[::2], rest[1::2], strict=True))


def _tool_names(turns: Sequence[Message], tools: list[dict[str, Any]] | None) -> set[str]:
    calls = [call for turn in turns for call in turn.fields.get("tool_calls", ())]
    return {entry.get("function", entry)["name"] for entry in [*calls, *(tools or ())]}


def _spans(whole: Text, answers: list[tuple[Text, Text]]) -> list[tuple[int, int]] | None:
    """Where answers begin and end in all turns, as text or as tokens.

    None where what comes before an answer, or the answer, changes once more follows.
    """
    for before, after in answers:
        if whole[: len(after)] != after or after[: len(before)] != before:
            return None
    return [(len(before), len(after)) for before, after in answers]


def _pieces(
    whole: Text, spans: list[tuple[int, int]], learned: list[bool]
) -> Iterator[tuple[Text, bool]]:
    """What stands before, in, between and after the answers, and whether it is learned."""
    done = 0
    for (begin, end), counts in zip(spans, learned, strict=True):
        yield whole[done:begin], False
        yield whole[begin:end], counts
        done = end
    yield whole[done:], False


def _plainly(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Written:
    if _tool_names(turns, getattr(turns, "tools", None)) or any(t.role == "tool" for t in turns):
        raise ValueError("it has tools, and the tokenizer no chat template that can write them")
    pieces = [(text_start(tokenizer), False)]
    for turn in turns:
        ends = turn.role == "assistant" and tokenizer.eos_token_id is not None
        end = [tokenizer.eos_token_id] if ends else []
        pieces += [
            (_tokens(tokenizer, f"{turn.role.capitalize()}: "), False),
            (_tokens(tokenizer, turn.content) + end, turn.learned),
            (_tokens(tokenizer, "\n"), False),
        ]
    return _joined(pieces)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Ids:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _joined(pieces: Iterable[tuple[Ids, bool]]) -> Written:
    """Tokens of all pieces, and labels of those that are learned."""
    ids: Ids = []
    labels: Ids = []
    for piece, counts in pieces:
        ids += piece
        labels += piece if counts else [IGNORED] * len(piece)
    return ids, labels
