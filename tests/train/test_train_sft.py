"""Conversations: what is read, what is learned from; and SFTTrainer with MoE layers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bos_tokenizer import BOS, bos_tokenizer
from transformers import MixtralConfig

from etr.data import byte_tokenizer
from etr.data import chat as chat_module
from etr.data.chat import ChatTemplate
from etr.hf import EtrConfig, EtrForCausalLM, load_pretrained
from etr.moe import moe_layers, selecting
from etr.train.conversations import Conversation, Message, encode, read_conversations
from etr.train.sft import SftConfig, sft

IGNORED = -100
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True, scope="module")
def one_process() -> Iterator[None]:
    """The templates of all tests run in one process, which takes a second to start."""
    running: list[Any] = []

    def start(own: Callable[[], Any] = chat_module._start) -> Any:
        if not running or running[-1].poll() is not None:
            running.append(own())
        return running[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_module, "_start", start)
        patch.setattr(ChatTemplate, "close", lambda self: setattr(self, "_process", None))
        yield
    for process in running:
        process.kill()
        process.communicate()


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


def chat(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]}


def test_three_formats_and_empty_lines_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        chat("hi", "ho"),
        "",
        {"prompt": "2+2?", "completion": "4"},
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        {"instruction": "Say x", "input": "", "output": "x"},
    )
    found = [[m.content for m in messages] for messages in read_conversations(path)]
    assert found == [["hi", "ho"], ["2+2?", "4"], ["Add\n\n1, 2", "3"], ["Say x", "x"]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "must be a JSON object"),
        ({"text": "a"}, "has the keys text; must be"),
        ({"messages": []}, "must be a list of turns"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "one of system, user, assistant"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn of the assistant"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "'content' must be a text"),
        ({"prompt": "a"}, "'completion' must be a text"),
        ({"instruction": "a", "output": 3}, "'output' must be a text"),
    ],
)
def test_bad_lines_are_named(line: Any, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", chat("a", "b"), "", line)
    with pytest.raises(ValueError, match="line 3: ") as error:
        read_conversations(path)
    assert reason in str(error.value)


def test_files_without_conversations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no conversation"):
        read_conversations(write(tmp_path / "a.jsonl", ""))
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"line 1: .*utf-8"):
        read_conversations(tmp_path / "b.jsonl")


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_assistant_is_learned_from_alone(template: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    talk = [Message(role=r, content=c) for r, c in (("user", "ab"), ("assistant", "cd")) * 2]
    (row,) = encode([talk], tokenizer, 1000)
    text = tokenizer.decode(row["input_ids"])
    learned = tokenizer.decode([t for t in row["labels"] if t != IGNORED])
    if template is None:
        assert text == "User: ab\nAssistant: cd<eos>\nUser: ab\nAssistant: cd<eos>\n"
        assert learned == "cd<eos>cd<eos>"
    else:
        assert text == "[user]ab;[assistant]cd;[user]ab;[assistant]cd;"
        assert learned == "cd;cd;"
    kept = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert kept == [t for t in row["labels"] if t != IGNORED]


def test_long_conversations_are_cut_and_left_out_without_an_answer() -> None:
    tokenizer = byte_tokenizer()
    talk = [Message(role="user", content="a" * 20), Message(role="assistant", content="b" * 20)]
    assert encode([talk], tokenizer, 30) == []
    (row,) = encode([talk], tokenizer, 44)
    assert len(row["input_ids"]) == len(row["labels"]) == 44
    assert sum(label != IGNORED for label in row["labels"]) == 6


def test_no_token_reaches_over_the_beginning_of_an_answer() -> None:
    """As in use, where the model goes on from the tokens of the prompt alone."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("assistantuser\n |xyz"))
    vocab = {piece: number for number, piece in enumerate([*letters, "\n "])}
    merging = Tokenizer(models.BPE(vocab=vocab, merges=[("\n", " ")]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=merging, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + '\n' + m.content + '|' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    assert vocab["\n "] in tokenizer("user\n x")["input_ids"]
    talk = [Message(role="user", content="x"), Message(role="assistant", content=" y")]
    (row,) = encode([talk + talk], tokenizer, 100)
    assert vocab["\n "] not in row["input_ids"]
    assert tokenizer.decode(row["input_ids"]).replace(" ", "") == "user\nx|assistant\ny|" * 2
    learned = [label for label in row["labels"] if label != IGNORED]
    assert learned == [vocab[piece] for piece in " y|"] * 2


def test_a_template_that_rewrites_turns_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    talk = [Message(role=r, content="x") for r in ("user", "assistant", "user")]
    with pytest.raises(ValueError, match="conversation 1 cannot be written: its chat template"):
        encode([talk], tokenizer, 100)


@pytest.mark.parametrize("single", ["<bos> $A", "<bos> $A <eos>"])
def test_plain_text_begins_as_the_tokenizer_begins_it(single: str) -> None:
    tokenizer = bos_tokenizer(single)
    talk = [Message(role=r, content=c) for r, c in (("user", "ab"), ("assistant", "cd")) * 2]
    (row,) = encode([talk], tokenizer, 1000)
    (plain,) = encode([talk], byte_tokenizer(), 1000)
    assert row["input_ids"] == [BOS, *plain["input_ids"]]
    assert row["labels"] == [IGNORED, *plain["labels"]]


@pytest.mark.parametrize("writes", [True, False])
def test_a_template_alone_says_whether_there_is_a_bos(writes: bool) -> None:
    """As in the tokenizer's own apply_chat_template; never two."""
    tokenizer = bos_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.chat_template = "{{ bos_token }}" * writes + TEMPLATE
    talk = [Message(role="user", content="ab"), Message(role="assistant", content="cd")]
    (row,) = encode([talk], tokenizer, 1000)
    turns = [{"role": m.role, "content": m.content} for m in talk]
    assert row["input_ids"] == tokenizer.apply_chat_template(turns, return_dict=False)
    assert row["input_ids"].count(BOS) == writes


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLS = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}
WITH_TOOLS = (
    "{% if tools %}<{% for t in tools %}{{ t.function.name }}{% endfor %}>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %};{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def talk_with_tools() -> Conversation:
    return Conversation(
        [
            Message(role="user", content="1+1?"),
            Message(role="assistant", content="", fields=CALLS),
            Message(role="tool", content="2"),
            Message(role="assistant", content="two"),
        ],
        [TOOL],
        "talks.jsonl, line 7",
    )


def test_tool_calls_are_written_by_the_template_and_learned() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = WITH_TOOLS
    (row,) = encode([talk_with_tools()], tokenizer, 1000)
    text = '<add>[user]1+1?;[assistant]add({"a": 1});[tool]2;[assistant]two;'
    assert tokenizer.decode(row["input_ids"]) == text
    learned = tokenizer.decode([t for t in row["labels"] if t != IGNORED])
    assert learned == 'add({"a": 1});two;'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "it has tools, and the tokenizer no chat template"),
        (TEMPLATE, "its chat template leaves out the tool 'add'"),
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}"
            "{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}",
            "its chat template leaves out the turns of tools",
        ),
        ("{{ raise_exception('no\ntools') }}", "its chat template fails: TemplateError: no tools"),
        ("{% for m in %}", "its chat template fails: TemplateSyntaxError in line 1"),
    ],
)
def test_what_cannot_be_written_is_named_with_its_line(template: Any, reason: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=reason) as error:
        encode([talk_with_tools()], tokenizer, 1000)
    assert str(error.value).startswith("talks.jsonl, line 7: the conversation cannot be written: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_answers_that_are_context_are_seen_and_not_learned(template: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    talk = [
        Message(role="user", content="a"),
        Message(role="assistant", content="b", context=True),
        Message(role="user", content="c"),
        Message(role="assistant", content="d"),
    ]
    (row,) = encode([talk], tokenizer, 1000)
    whole = [dataclasses.replace(turn, context=False) for turn in talk]
    (other,) = encode([whole], tokenizer, 1000)
    assert row["input_ids"] == other["input_ids"]
    learned = tokenizer.decode([t for t in row["labels"] if t != IGNORED])
    assert learned == ("d<eos>" if template is None else "d;")


def test_a_template_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "SECONDS", 1.0)
    tokenizer = byte_tokenizer()
    loop = "{% for a in range(99999) %}"
    tokenizer.chat_template = f"{loop}{loop}{{% endfor %}}{{% endfor %}}"
    talk = [Message(role="user", content="ab"), Message(role="assistant", content="cd")]
    with pytest.raises(ValueError, match=r"conversation 1 cannot be written: .*not end within"):
        encode([talk], tokenizer, 1000)


def tiny() -> EtrForCausalLM:
    torch.manual_seed(0)
    base = MixtralConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return EtrForCausalLM(EtrConfig.from_base(base))


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    return write(
        tmp_path / "talks.jsonl", *(chat(f"say {n}", "ok " * (1 + n % 3)) for n in range(16))
    )


def options(talks: Path, out: Path, **changes: Any) -> SftConfig:
    values: dict[str, Any] = {
        "data": str(talks),
        "out": str(out),
        "steps": 4,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "use_cpu": True,
    }
    return SftConfig(**{**values, **changes})


@pytest.mark.parametrize("rank", [0, 2])
def test_fine_tuning_learns_answers_and_thresholds(rank: int, talks: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra sft")
    if rank:
        pytest.importorskip("peft", reason="needs the extra peft")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = sft(model, tokenizer, options(talks, tmp_path / "out", lora_rank=rank, steps=6))
    assert any("eos_token '<eos>' pads" in note for note in result.notes)
    assert any("no chat template" in note for note in result.notes)
    assert len(result.rows) == 6
    assert float(result.rows[-1]["loss"]) < float(result.rows[0]["loss"])
    assert result.rows[0]["router_loss_aux"] > 0
    assert result.rows[0]["capacity_factor"] < result.rows[-1]["capacity_factor"]
    tuned = load_pretrained(result.out)
    assert all(layer.calibration.is_calibrated for layer in moe_layers(tuned))
    changed = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
    assert ("lm_head.weight" in changed) == (rank == 0)
    assert {name for name in changed if "experts" in name} == {
        name for name in before if "experts" in name
    }
    assert (result.out / "tokenizer.json").is_file()
    assert json.loads((result.out / "sft.json").read_text())["rows"][0]["step"] == 1


def test_thresholds_keep_what_training_keeps(tmp_path: Path) -> None:
    """Those learned on the way are late: weights still move, and there were few steps."""
    pytest.importorskip("trl", reason="needs the extra sft")
    lines = (chat(f"say {n} " + "and " * (n % 5), "yes " * (4 + n % 7)) for n in range(48))
    data, tokenizer = write(tmp_path / "more.jsonl", *lines), byte_tokenizer()
    rows = encode(read_conversations(data), tokenizer, 128)
    rows.sort(key=lambda row: len(row["input_ids"]))
    batches = [
        torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row["input_ids"]) for row in rows[first : first + 16]],
            batch_first=True,
            padding_value=-1,
        )
        for first in range(0, 48, 16)
    ]
    gaps = []
    for number in (64, 0):
        out = tmp_path / str(number)
        changes = {"steps": 6, "batch_size": 16, "learning_rate": 3e-2}
        config = options(data, out, calibration_batches=number, **changes)
        result = sft(tiny(), tokenizer, config)
        assert any("found on 3 micro-batches" in note for note in result.notes) == (number > 0)
        model, kept = load_pretrained(out).eval(), []
        for how in ("batch", "threshold"):
            pairs = [0, 0]
            with selecting(model, how), torch.no_grad():
                for ids in batches:
                    mask = (ids >= 0).long()
                    for stats in model(ids.clamp_min(0), attention_mask=mask).routing_stats:
                        pairs[0] += int(stats["num_tokens_per_expert"].sum())
                        pairs[1] += int(stats["num_choices_per_expert"].sum())
            kept.append(pairs[0] / pairs[1])
        gaps.append(abs(kept[0] - kept[1]))
    assert gaps[0] < 0.02 < gaps[1]


def test_router_losses_reach_the_routers_past_our_forward(talks: Path, tmp_path: Path) -> None:
    """SFTTrainer computes the loss itself; without text gradient the balance loss still acts."""
    model = tiny().train()
    x = torch.randint(0, 255, (2, 8))
    mask = torch.ones_like(x)
    mask[0, 5:] = 0
    grads = []
    for backbone in (False, True):
        model.zero_grad()
        if backbone:
            hidden = model.model(input_ids=x, attention_mask=mask).last_hidden_state
            (0.0 * hidden.sum()).backward()
        else:
            out = model(x, attention_mask=mask)
            sum(out.router_losses.values()).backward()
        grads.append([layer.router.weight.grad.clone() for layer in moe_layers(model)])
        for layer in moe_layers(model):
            assert int(layer.pending["num_valid_tokens"]) == (26 if backbone else 13)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.abs().sum() > 0


def test_bad_options_are_refused_before_anything_is_written(talks: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs the extra sft")
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="exists already"):
        sft(tiny(), tokenizer, options(talks, tmp_path))
    with pytest.raises(ValueError, match="cuts off the answer of every"):
        sft(tiny(), tokenizer, options(talks, tmp_path / "out", max_length=4))
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad_token nor an eos_token"):
        sft(tiny(), tokenizer, options(talks, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        options(talks, tmp_path, steps=0)
