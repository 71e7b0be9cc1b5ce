"""Conversations in the formats that people have, as turns in the words of chat templates.

A new format: a function from a record to turns, and one line in `FORMATS`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from etr.data.reading import read_rows

ROLES = {name: name for name in ("system", "user", "assistant", "tool")} | {"developer": "system"}
"""From a role to the one that chat templates know; a developer's words stand as the system's."""
SHAREGPT_ROLES = ROLES | {
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "human": "user",
    "observation": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are text."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn."""

    role: str
    """system, user, assistant or tool."""
    content: str
    """Its text; may be empty beside tool calls."""
    fields: dict[str, Any] = field(default_factory=dict)
    """What else chat templates may read: tool_calls, tool_call_id, name and others."""
    context: bool = False
    """A turn of the assistant that is not learned from."""

    @property
    def learned(self) -> bool:
        """Whether this turn is learned from: the assistant's are."""
        return self.role == "assistant" and not self.context


class Conversation(list[Message]):
    """Turns in order.

    Args:
        turns: at least one.
        tools: definitions of the functions that the assistant may call, as JSON schemas.
        where: in which file and row it stands.
    """

    def __init__(
        self, turns: Iterable[Message], tools: list[dict[str, Any]] | None = None, where: str = ""
    ) -> None:
        super().__init__(turns)
        self.tools, self.where = tools, where


@dataclass(frozen=True, kw_only=True)
class Format:
    """A shape of records."""

    name: str
    """Name that people call it by."""
    shape: str
    """How errors show it."""
    keys: tuple[str, ...]
    """A record of this format has one of these."""
    read: Callable[[dict[str, Any]], list[Message]] | None = None
    """From the record to its turns; None where it is known and not read."""
    instead: str = ""
    """What to do with it then."""


def format_of(record: Any) -> Format | None:
    """The first format of the table that a record has a key of."""
    if not isinstance(record, dict):
        return None
    return next((f for f in FORMATS if any(record.get(key) is not None for key in f.keys)), None)


def read_conversations(path: str | Path) -> list[Conversation]:
    """Read a conversation from each record of a file.

    Args:
        path: JSON lines, a JSON array or Parquet, whose records have one of the `FORMATS`.
    Raises:
        FileNotFoundError: no such file.
        ValueError: a record that is no conversation, named by its line or row, or none at all.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data={str(path)!r} is not a file; give a file of JSON lines")
    found = []
    for where, record in read_rows(path):
        try:
            found.append(_conversation(record, where))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if not found:
        raise ValueError(f"{path} holds no conversation; each line must be {SHAPES}")
    return found


def _conversation(record: Any, where: str) -> Conversation:
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object: {SHAPES}")
    form = format_of(record)
    if form is None:
        raise ValueError(f"has the keys {', '.join(sorted(record)) or 'none'}; must be {SHAPES}")
    if form.read is None:
        raise ValueError(
            f"has the keys {', '.join(sorted(record))}; must be {SHAPES}. It looks like "
            f"{form.name}: {form.instead}"
        )
    turns = form.read(record)
    if all(turn.role != "assistant" for turn in turns):
        raise ValueError(
            f"{form.keys[0]!r} has no turn of the assistant, so there is nothing to learn"
        )
    return Conversation(turns, _tools(record.get("tools")), where)


def _chat(record: dict[str, Any]) -> list[Message]:
    return _turns(record["messages"], "messages")


def _sharegpt(record: dict[str, Any]) -> list[Message]:
    turns = record["conversations"]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        found = _turns(turns, "conversations")
    else:
        found = _turns(turns, "conversations", SHAREGPT_ROLES, ("from", "value"))
    return [*_system(record), *found]


def _prompt(record: dict[str, Any]) -> list[Message]:
    if isinstance(record.get("prompt"), list) and isinstance(record.get("completion"), list):
        before = _turns(record["prompt"], "prompt")
        after = _turns(record["completion"], "completion")
        return [*(dataclasses.replace(turn, context=True) for turn in before), *after]
    return [_question(_text(record, "prompt")), _answer(record, "completion")]


def _alpaca(record: dict[str, Any]) -> list[Message]:
    question = _text(record, "instruction")
    if record.get("input"):
        question = f"{question}\n\n{_text(record, 'input')}"
    if record.get("history"):
        raise ValueError("'history' is not read; write the turns as 'messages'")
    return [*_system(record), _question(question), _answer(record, "output")]


FORMATS = (
    Format(
        name="chat messages",
        shape='{"messages": [{"role": ..., "content": ...}, ...]}',
        keys=("messages",),
        read=_chat,
    ),
    Format(
        name="ShareGPT",
        shape='{"conversations": [{"from": ..., "value": ...}, ...]}',
        keys=("conversations",),
        read=_sharegpt,
    ),
    Format(
        name="preferences",
        shape='{"prompt": ..., "chosen": ..., "rejected": ...}',
        keys=("chosen", "rejected"),
        instead="TRL's DPOTrainer learns from them",
    ),
    Format(
        name="prompt and completion",
        shape='{"prompt": ..., "completion": ...}',
        keys=("prompt", "completion"),
        read=_prompt,
    ),
    Format(
        name="Alpaca",
        shape='{"instruction": ..., "input": ..., "output": ...}',
        keys=("instruction", "output"),
        read=_alpaca,
    ),
    Format(
        name="plain text",
        shape='{"text": ...}',
        keys=("text",),
        instead="transformers' Trainer learns from it",
    ),
)
"""The formats, in the order in which they are tried."""
SHAPES = " or ".join(form.shape for form in FORMATS if form.read)


def _turns(
    values: Any,
    key: str,
    roles: dict[str, str] = ROLES,
    names: tuple[str, str] = ("role", "content"),
) -> list[Message]:
    """The turns in a list of objects whose role and text have these names."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key!r} must be a list of turns")
    found = []
    for number, turn in enumerate(values, 1):
        try:
            found.append(_turn(turn, roles, *names))
        except ValueError as error:
            raise ValueError(f"turn {number} of {key!r}: {error}") from None
    return found


def _turn(turn: Any, roles: dict[str, str], role: str, content: str) -> Message:
    name = turn.get(role) if isinstance(turn, dict) else None
    if not isinstance(name, str) or name not in roles:
        raise ValueError(
            f"every turn needs a {role!r}, one of {', '.join(roles)}; got {_short(turn)}"
        )
    if turn.get("function_call"):
        raise ValueError("'function_call' is an older form; write it as 'tool_calls'")
    rest = {k: v for k, v in turn.items() if k not in (role, content, "weight") and v is not None}
    if rest.get("tool_calls"):
        rest["tool_calls"] = _calls(rest["tool_calls"])
        text = _text(turn, content) if turn.get(content) else ""
    else:
        rest.pop("tool_calls", None)
        text = _text(turn, content)
    context = turn.get("weight") == 0  # as in fine-tuning at OpenAI
    return Message(role=roles[name], content=text, fields=rest, context=context)


def _calls(values: Any) -> list[dict[str, Any]]:
    """Calls of tools, their arguments as objects, which is how chat templates take them."""
    found = []
    for call in _functions(values, "tool_calls"):
        function = call.get("function", call)
        arguments = _unpacked(function.get("arguments") or {}, "arguments")
        if not isinstance(arguments, dict):
            raise ValueError(f"'arguments' must be an object; got {_short(arguments)}")
        found.append({**call, "function": {**function, "arguments": arguments}})
    return found


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Definitions of tools."""
    return (_functions(_unpacked(value, "tools"), "tools") if value else None) or None


def _functions(values: Any, key: str) -> list[dict[str, Any]]:
    """A list of objects that each name a function."""
    for value in values if isinstance(values, list) else [None]:
        function = value.get("function", value) if isinstance(value, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"{key!r} must be a list of functions with a 'name'; got {_short(values)}"
            )
    return list(values)


def _unpacked(value: Any, key: str) -> Any:
    """What many files hold as a text of JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key!r} is a text that is not JSON: {error}") from None


def _system(record: dict[str, Any]) -> list[Message]:
    return [Message(role="system", content=_text(record, "system"))] if record.get("system") else []


def _question(text: str) -> Message:
    return Message(role="user", content=text)


def _answer(record: dict[str, Any], key: str) -> Message:
    """An empty answer teaches nothing; files of instructions hold some."""
    text = "" if record.get(key) == "" else _text(record, key)
    return Message(role="assistant", content=text, context=not text)


def _text(values: dict[str, Any], key: str) -> str:
    """A text, or the joined texts of content parts."""
    value = values.get(key)
    if isinstance(value, list):
        value = "".join(_part(part, number, key) for number, part in enumerate(value, 1))
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key!r} must be a text that is not empty; got {_short(value)}")
    return value


def _part(part: Any, number: int, key: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise ValueError(
            f"part {number} of {key!r} has the type {kind!r}; only texts are read: "
            '{"type": "text", "text": ...}'
        )
    return str(part["text"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
