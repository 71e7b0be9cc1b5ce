"""Every format that people have becomes turns, or is named with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from etr.data.conversations import FORMATS, read_conversations

U, A, S = "user", "assistant", "system"
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def chat(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def sharegpt(*turns: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": f, "value": v} for f, v in turns], **more}


READ: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "messages": (chat(said(U, "hi"), said(A, "ho")), [(U, "hi"), (A, "ho")]),
    "developer": (
        chat(said("developer", "be"), said(U, "hi"), said(A, "ho")),
        [(S, "be"), (U, "hi"), (A, "ho")],
    ),
    "content parts": (
        chat(
            said(U, [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]),
            said(A, [{"type": "output_text", "text": "c"}, "d"]),
        ),
        [(U, "ab"), (A, "cd")],
    ),
    "nulls of other rows": (
        {"messages": [said(U, "a", tool_calls=None), said(A, "b", name=None)], "prompt": None},
        [(U, "a"), (A, "b")],
    ),
    "ShareGPT": (
        sharegpt(("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")),
        [(S, "s"), (U, "a"), (A, "b"), (U, "c"), (A, "d")],
    ),
    "ShareGPT beside a system text": (
        sharegpt(("user", "a"), ("assistant", "b"), system="s"),
        [(S, "s"), (U, "a"), (A, "b")],
    ),
    "ShareGPT in the words of messages": (
        {"conversations": [said(U, "a"), said(A, "b")]},
        [(U, "a"), (A, "b")],
    ),
    "Alpaca": (
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        [(U, "Add\n\n1, 2"), (A, "3")],
    ),
    "Alpaca without input": (
        {"instruction": "Say", "input": "", "output": "x", "system": "s"},
        [(S, "s"), (U, "Say"), (A, "x")],
    ),
    "prompt and completion": ({"prompt": "2+2?", "completion": "4"}, [(U, "2+2?"), (A, "4")]),
    "turns as prompt and completion": (
        {"prompt": [said(U, "a"), said(A, "b"), said(U, "c")], "completion": [said(A, "d")]},
        [(U, "a"), (A, "b"), (U, "c"), (A, "d")],
    ),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_formats_are_read(name: str, suffix: str, tmp_path: Path) -> None:
    record, expected = READ[name]
    path = tmp_path / f"a.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps([record], indent=2))
    elif suffix == "jsonl":
        write(path, record)
    elif name == "content parts":
        pytest.skip("a column of Parquet has one type")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    (found,) = read_conversations(path)
    assert [(turn.role, turn.content) for turn in found] == expected
    assert not any("tool_calls" in turn.fields or "name" in turn.fields for turn in found)


def test_every_format_that_is_read_is_tested() -> None:
    keys = {key for record, _ in READ.values() for key in record}
    assert all(keys & set(form.keys) for form in FORMATS if form.read)


def test_tool_calls_keep_what_templates_need(tmp_path: Path) -> None:
    turns = [
        said(U, "1+1?"),
        said(A, None, tool_calls=[CALL]),
        said("tool", "2", tool_call_id="1", name="add"),
        said(A, "two", reasoning_content="easy"),
    ]
    path = write(tmp_path / "a.jsonl", {"messages": turns, "tools": [TOOL]})
    (found,) = read_conversations(path)
    assert found.tools == [TOOL]
    assert found.where == f"{path}, line 1"
    assert [(turn.role, turn.content) for turn in found] == [
        (U, "1+1?"),
        (A, ""),
        ("tool", "2"),
        (A, "two"),
    ]
    call = {**CALL, "function": {"name": "add", "arguments": {"a": 1}}}
    assert found[1].fields == {"tool_calls": [call]}
    assert found[2].fields == {"tool_call_id": "1", "name": "add"}
    assert found[3].fields == {"reasoning_content": "easy"}
    assert [turn.learned for turn in found] == [False, True, False, True]


def test_tools_may_be_a_text_of_json(tmp_path: Path) -> None:
    record = sharegpt(("human", "a"), ("observation", "b"), ("gpt", "c"), tools=json.dumps([TOOL]))
    (found,) = read_conversations(write(tmp_path / "a.jsonl", record))
    assert found.tools == [TOOL]
    assert [turn.role for turn in found] == [U, "tool", A]


def test_answers_that_are_context_are_not_learned(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        chat(said(U, "a"), said(A, "b", weight=0), said(U, "c"), said(A, "d", weight=1)),
        READ["turns as prompt and completion"][0],
        {"instruction": "a", "output": ""},
    )
    found = read_conversations(path)
    assert [[t.learned for t in talk] for talk in found] == [
        [False, False, False, True],
        [False, False, False, True],
        [False, False],
    ]
    assert "weight" not in found[0][1].fields


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "a", "rejected": "b"}, "looks like preferences: TRL's DPOTrainer"),
        ({"text": "a"}, "looks like plain text: transformers' Trainer"),
        ({"question": "a", "answer": "b"}, "has the keys answer, question; must be"),
        ({}, "has the keys none; must be"),
        ({"messages": None}, "has the keys messages; must be"),
        (chat(), "'messages' must be a list of turns"),
        (chat("hi"), "turn 1 of 'messages': every turn needs a 'role'"),
        (chat(said(U, "a"), said(["user"], "b")), "turn 2 of 'messages': every turn needs"),
        (chat(said("function", "a")), "one of system, user, assistant, tool, developer"),
        (chat(said(U, [{"type": "image_url", "image_url": {}}])), "part 1 .* type 'image_url'"),
        (chat(said(U, [{"type": "text"}])), "part 1 of 'content'"),
        (chat(said(U, [3])), "part 1 of 'content' has the type 'int'"),
        (chat(said(U, [])), "'content' must be a text that is not empty"),
        (chat(said(A, None)), "'content' must be a text"),
        (chat(said(A, None, function_call={"name": "f"})), "write it as 'tool_calls'"),
        (chat(said(A, "", tool_calls=[{"type": "function"}])), "functions with a 'name'"),
        (chat(said(A, "", tool_calls={"name": "f"})), "'tool_calls' must be a list"),
        (
            chat(said(A, "", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])),
            "'arguments' is a text that is not JSON",
        ),
        (
            chat(said(A, "", tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])),
            "'arguments' must be an object",
        ),
        ({**chat(said(A, "a")), "tools": "add"}, "'tools' is a text that is not JSON"),
        ({**chat(said(A, "a")), "tools": [{"function": 3}]}, "'tools' must be a list of functions"),
        (sharegpt(("human", "a")), "'conversations' has no turn of the assistant"),
        (sharegpt(("function_call", "a")), "every turn needs a 'from', one of"),
        (sharegpt(("gpt", "")), "'value' must be a text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' must be a text"),
        ({"instruction": "a", "output": "b", "history": [["a", "b"]]}, "'history' is not read"),
        ({"instruction": "a", "output": None}, "'output' must be a text"),
        ({"prompt": [said(U, "a")], "completion": "b"}, "part 1 of 'prompt'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_row(record: Any, reason: str, tmp_path: Path) -> None:
    good = chat(said(U, "a"), said(A, "b"))
    (tmp_path / "a.json").write_text(json.dumps([good, record]))
    with pytest.raises(ValueError, match=rf"a\.json, row 2: .*({reason})") as error:
        read_conversations(tmp_path / "a.json")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 800
