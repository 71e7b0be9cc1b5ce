"""lm-evaluation-harness takes the model as it is, offline, with a task of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import base_config, quiet_eval

from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer
from etr.hf import EtrConfig, EtrForCausalLM

lm_eval = pytest.importorskip("lm_eval", reason="the extra 'eval' (lm-eval) is not installed")

QUESTIONS = (
    {"question": "two plus two is", "choices": ["four", "nine"], "answer": 0},
    {"question": "the sky is", "choices": ["green", "blue"], "answer": 1},
    {"question": "ice is", "choices": ["cold", "hot and loud"], "answer": 0},
)


def test_multiple_choice_equals_a_hand_computation(tmp_path: Path, monkeypatch) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (tmp_path / "own.yaml").write_text(
        f"""
task: own
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "questions.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
    )
    config = EtrConfig.from_base(base_config(vocab_size=BYTE_VOCAB_SIZE), top_k=1)
    model, tokenizer = quiet_eval(EtrForCausalLM(config)), byte_tokenizer()
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", device="cpu"),
        tasks=["own"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=False,
        bootstrap_iters=0,
    )

    def log_likelihood(question: str, choice: str) -> float:
        prompt = tokenizer(question, add_special_tokens=False)["input_ids"]
        answer = tokenizer(" " + choice, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logs = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)[0]
        return float(logs[-len(answer) :].gather(1, ids[0, -len(answer) :, None]).sum())

    right = [
        max((0, 1), key=lambda i: log_likelihood(q["question"], q["choices"][i])) == q["answer"]
        for q in QUESTIONS
    ]
    assert found["results"]["own"]["acc,none"] == pytest.approx(sum(right) / 3)
