"""Texts and questions begin as the model's tokenizer, or its chat template, begins them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bos_tokenizer import BOS, EOS, bos_tokenizer
from torch import Tensor
from transformers import MixtralConfig

from etr.cli import main
from etr.cli.generate import GenerateConfig, continue_text
from etr.data import BYTE_VOCAB_SIZE, DataConfig, held_out_batches, open_data
from etr.data import chat as chat_module
from etr.evaluate import Exam, evaluate, run_tasks
from etr.hf import EtrConfig, EtrForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
QUESTION = {"prompt": "Question: sky\nAnswer:", "choices": ["blue", "red"], "answer": 0}
TASK = Exam(name="own", label="own", questions=[QUESTION | {"category": ""}])
OPEN = Exam(
    name="open",
    label="open",
    questions=[{"prompt": "a b", "category": ""}],
    score=lambda question, answer: {"length": float(len(answer))},
    max_new_tokens=2,
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ENDLESS = "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2


@pytest.fixture(scope="module")
def model() -> EtrForCausalLM:
    torch.manual_seed(0)
    base = MixtralConfig(
        vocab_size=BYTE_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=256,
    )
    return EtrForCausalLM(EtrConfig.from_base(base, top_k=1)).eval()


@pytest.fixture
def seen(model: EtrForCausalLM) -> Any:
    """First rows of token ids that the model is given, without padding."""
    rows: list[list[int]] = []

    def look(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        rows.extend([token for token in row if token not in (256, 0)] for row in ids.tolist())

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    yield rows
    handle.remove()


def tokenizer(single: str, template: str | None = None) -> Any:
    """One that reads the names of special tokens as such, as those of checkpoints do."""
    found = bos_tokenizer(single)
    found.split_special_tokens = False
    found.chat_template = template
    return found


@pytest.mark.parametrize(
    ("single", "template", "expected"),
    [
        ("$A", None, [*QUESTION["prompt"].encode()]),
        ("<bos> $A", None, [BOS, *QUESTION["prompt"].encode()]),
        ("<bos> $A", TEMPLATE, [BOS, *f"[user]{QUESTION['prompt']}[assistant]".encode()]),
        (
            "<bos> $A",
            TEMPLATE.removeprefix("{{ bos_token }}"),
            [*f"[user]{QUESTION['prompt']}[assistant]".encode()],
        ),
        ("$A", TEMPLATE, [BOS, *f"[user]{QUESTION['prompt']}[assistant]".encode()]),
    ],
)
def test_questions(
    single: str,
    template: str | None,
    expected: list[int],
    model: EtrForCausalLM,
    seen: list[list[int]],
) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' (lm-eval) is not installed")
    run_tasks(model, tokenizer(single, template), [TASK], chat=template is not None)
    assert seen
    assert all(row[: len(expected)] == expected for row in seen)
    assert all(row.count(BOS) == expected.count(BOS) for row in seen)


@pytest.mark.parametrize("single", ["$A", "<bos> $A"])
def test_questions_that_are_answered_in_words(
    single: str, model: EtrForCausalLM, seen: list[list[int]]
) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' (lm-eval) is not installed")
    run_tasks(model, tokenizer(single), [OPEN])
    assert seen[0] == [BOS] * (single != "$A") + [*b"a b"]


def test_a_tokenizer_that_ends_every_text_is_refused(model: EtrForCausalLM) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' (lm-eval) is not installed")
    with pytest.raises(ValueError, match="puts a token after every text"):
        run_tasks(model, tokenizer("<bos> $A <eos>"), [TASK])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (ENDLESS, "its chat template does not end within 1 s"),
        ("{{ raise_exception('no\nway') }}", "its chat template fails: TemplateError: no way"),
        ("{% for m in %}", "its chat template fails: TemplateSyntaxError in line 1: Expected"),
    ],
)
def test_a_bad_template_is_one_line(
    template: str,
    reason: str,
    model: EtrForCausalLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' (lm-eval) is not installed")
    monkeypatch.setattr(chat_module, "SECONDS", 1.0 if template is ENDLESS else 20.0)
    model.save_pretrained(tmp_path / "model")
    tokenizer("$A", template).save_pretrained(tmp_path / "model")
    asked = {"question": "sky", "choices": ["blue", "red"], "answer": 0}
    (tmp_path / "q.jsonl").write_text(json.dumps(asked))
    words = ["--tasks", "questions", "--questions", str(tmp_path / "q.jsonl"), "--chat"]
    assert main(["evaluate", str(tmp_path / "model"), *words]) == 2
    shown = capsys.readouterr().err
    assert f"etr evaluate: {reason}" in shown
    assert "Traceback" not in shown


def test_templates_that_refuse_system_turns_go_without() -> None:
    from etr.data.chat import ChatTemplate
    from etr.evaluate.harness import _write_chat

    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    with ChatTemplate(tokenizer("$A", refusing + TEMPLATE)) as template:
        assert _write_chat(template, turns) == "<bos>[user]u[assistant]"
        assert _write_chat(template, turns, add_generation_prompt=False) == "<bos>[user]u"


@pytest.mark.parametrize(
    ("single", "prompt", "expected"),
    [
        ("$A", "hi", [104, 105]),
        ("$A", "", [EOS]),
        ("<bos> $A", "hi", [BOS, 104, 105]),
        ("<bos> $A", "", [BOS]),
        ("<bos> $A <eos>", "hi", [BOS, 104, 105]),
        ("<bos> $A", "<bos>hi", [BOS, 104, 105]),
    ],
)
def test_generate(
    single: str, prompt: str, expected: list[int], model: EtrForCausalLM, seen: list[list[int]]
) -> None:
    config = GenerateConfig(model="", prompt=prompt, max_new_tokens=1)
    continue_text(model, tokenizer(single), config)
    assert seen == [expected]


def test_held_out_loss_by_hand(model: EtrForCausalLM, tmp_path: Path) -> None:
    """Bos is seen and costs nothing; bits count per byte of the text."""
    texts = [f"document {number} about {number * 7919 % 97} things\n" * 3 for number in range(60)]
    lines = "".join(json.dumps({"text": text, "domain": "a"}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    bos_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = open_data(
        DataConfig(
            data=(str(tmp_path / "a.jsonl"),),
            tokenizer=str(tmp_path / "tokenizer"),
            cache_dir=str(tmp_path / "cache"),
        )
    ).dataset
    found = evaluate(model, held_out_batches(data, 64, 4), data.domains, "dropless")
    stream = torch.tensor([EOS, *data.held_out[0].tokens.tolist()])
    nats, count = 0.0, 0
    for start in range(0, len(stream) - 1, 64):
        row = stream[start : start + 65]
        with torch.no_grad():
            logs = model(input_ids=row[None, :-1]).logits.log_softmax(-1)[0]
        cost = -logs.gather(1, row[1:, None]).squeeze(1)[row[1:] != BOS]
        nats, count = nats + float(cost.sum()), count + len(cost)
    assert int((stream == BOS).sum()) > 1
    assert found.tokens_by_domain == {"a": count}
    assert found.loss == pytest.approx(nats / count, rel=1e-5)
    bits = nats / torch.tensor(2.0).log().item() / data.held_out[0].num_bytes
    assert found.bits_per_byte(data.bytes_per_token)["a"] == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("verb", ["calibrate", "trace"])
def test_other_commands_see_bos(
    verb: str, model: EtrForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save_pretrained(tmp_path / "model")
    bos_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    for number in range(40):
        text = " ".join(str((number * 7919 + i * i) % 1000) for i in range(40))
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    parquet = pytest.importorskip("pyarrow.parquet")
    rows: list[Tensor] = []
    forward = EtrForCausalLM.forward

    def look(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows.append(kwargs["input_ids"])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(EtrForCausalLM, "forward", look)
    options = ["--data", str(tmp_path / "text"), "--cache-dir", str(tmp_path / "cache")]
    options += ["--sequence-length", "32", "--batch-size", "4"]
    more = {"calibrate": ["--num-batches", "4"], "trace": ["--device", "cpu"]}[verb]
    assert main([verb, str(tmp_path / "model"), *options, *more]) == 0
    ids = torch.cat([row.flatten() for row in rows])
    begins = [pair == (EOS, BOS) for pair in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True)]
    assert sum(begins) > 0
    assert int((ids == BOS).sum()) >= sum(begins)
    if verb == "trace":
        texts = parquet.read_table(tmp_path / "model" / "trace.parquet")["text"].to_pylist()
        assert texts.count("<bos>") == int((ids == BOS).sum())
