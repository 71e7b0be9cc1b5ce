"""Chat templates in a process of their own: the same text, and an end to everything else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from etr.data import byte_tokenizer
from etr.data.chat import ChatTemplate

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "be\nbrief"},
    {"role": "user", "content": "héllo 😀 <b>"},
    {"role": "assistant", "content": "x"},
]
TOOL = {"type": "function", "function": {"name": "add", "description": "sums"}}
PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ tools | tojson if tools }}"
)
TEMPLATES = {
    "plain": PLAIN,
    "marked answers": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}",
}


def with_template(template: Any) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def running() -> Iterator[ChatTemplate]:
    """One process for many templates: each call sends the tokenizer's present one."""
    with ChatTemplate(with_template(PLAIN), characters=1000) as template:
        yield template


def write(running: ChatTemplate, template: Any, **options: Any) -> str:
    running._tokenizer.chat_template = template
    return running.write([(TURNS, options)])[0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("option", ["", "add_generation_prompt", "continue_final_message"])
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_it_writes_what_the_tokenizer_does(
    running: ChatTemplate, name: str, option: str, tools: Any
) -> None:
    tokenizer = running._tokenizer
    tokenizer.chat_template = {"default": TEMPLATES[name], "tool_use": "T" + TEMPLATES[name]}
    options = {option: True} if option else {}
    (found,) = running.write([(TURNS, options)], tools)
    expected = tokenizer.apply_chat_template(TURNS, tools=tools, tokenize=False, **options)
    assert found == expected
    assert found.startswith("T") == bool(tools)


def test_several_at_once(running: ChatTemplate) -> None:
    running._tokenizer.chat_template = PLAIN
    chats = [(TURNS[:2], {"add_generation_prompt": True}), (TURNS, {})]
    assert running.write(chats) == [
        "<bos>[system]be\nbrief[user]héllo 😀 <b>[assistant]",
        "<bos>[system]be\nbrief[user]héllo 😀 <b>[assistant]x",
    ]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError in line 1: Unexpected end"),
        ("a\n{% no_such %}", "TemplateSyntaxError in line 2: .* unknown tag 'no_such'"),
        ("{{ raise_exception('no\nsystem role') }}", "TemplateError: no system role$"),
        ("{{ messages[7].content }}", "UndefinedError: "),
        ("{{ messages.__class__.__mro__ }}", "SecurityError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{{ 'a' * 1001 }}", "it writes more than 1000 characters"),
        ("{{ 'a' * 10000000000000 }}", "MemoryError"),
        ({"other": PLAIN}, "multiple chat templates with no default"),
    ],
)
def test_errors_are_one_line_and_the_process_goes_on(
    running: ChatTemplate, template: Any, reason: str
) -> None:
    process = running._process
    with pytest.raises(ValueError, match=reason) as error:
        write(running, template)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert running._process is process


def test_memory_that_grows_is_stopped(running: ChatTemplate) -> None:
    grow = (
        "{% set n = namespace(x='aaaaaaaa') %}"
        "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x | length }}"
    )
    with pytest.raises(ValueError, match=r"MemoryError|by memory|does not end"):
        write(running, grow)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ((9 ** 9) ** 99999) ** 99 }}",
    ],
    ids=["loop", "one long operation"],
)
def test_one_that_does_not_end_is_cut(template: str) -> None:
    with ChatTemplate(with_template(template), seconds=1) as cut:
        with pytest.raises(ValueError, match=r"^its chat template does not end within 1 s$"):
            cut.write([(TURNS, {})])
        assert cut._process is None


def test_the_next_call_after_an_end_runs(running: ChatTemplate) -> None:
    write(running, PLAIN)
    assert running._process is not None
    running._process.kill()
    with pytest.raises(ValueError, match="ended the process that ran it"):
        write(running, PLAIN)
    assert write(running, "{{ messages[2].content }}") == "x"


def test_closing_ends_the_process() -> None:
    with ChatTemplate(with_template(PLAIN)) as template:
        assert template._process is None, "nothing runs before it is needed"
        template.write([(TURNS, {})])
        process = template._process
        assert process is not None
        assert process.poll() is None
    assert process.poll() is not None
