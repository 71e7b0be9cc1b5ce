"""One table for several models, and the command that makes it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from etr.cli import main
from etr.data import BYTE_VOCAB_SIZE, byte_tokenizer
from etr.evaluate import EvalResult, ModelResult, TaskResult, comparison_json, comparison_markdown
from etr.evaluate.comparison import held_out_result, paired, read_models, score_rows
from etr.evaluate.held_out import ratio_error
from etr.evaluate.tasks import HELD_OUT, Score
from etr.hf import EtrConfig, EtrForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
SIZES: dict[str, Any] = {
    "vocab_size": BYTE_VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": byte_tokenizer().pad_token_id,
}


def save(folder: Path, **options: Any) -> Path:
    """A two-layer model: ours with options, a plain dense one without."""
    torch.manual_seed(0)
    if options:
        base = MixtralConfig(num_local_experts=4, **SIZES)
        model: Any = EtrForCausalLM(EtrConfig.from_base(base, top_k=1, **options))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"text number {number}, one two three\n" * 8)
    return folder


@pytest.fixture
def options(text: Path, tmp_path: Path) -> list[str]:
    words = ["--data", str(text), "--cache-dir", str(tmp_path / "cache")]
    return [*words, "--sequence-length", "32", "--batch-size", "4"]


def result(name: str, value: float, task: str = "t") -> ModelResult:
    score = Score(value=value, error=0.125, count=10)
    scored = TaskResult(task=task, label="questions", scores={"all": {"acc": score}})
    return ModelResult(model=name, folder=f"runs/{name}", selection="dropless", tasks=[scored])


def test_models_stand_side_by_side() -> None:
    models = [result("a", 0.5), result("b", 0.25), result("c", 1.0, task="u")]
    first, second = score_rows(models)
    assert first.cells() == ["t", "all", "acc", "10", "0.5000 ± 0.1250", "0.2500 ± 0.1250", "-"]
    assert second.cells()[-3:] == ["-", "-", "1.0000 ± 0.1250"]
    page = comparison_markdown(models)
    assert "| task | category | measure | n | a | b | c |" in page
    assert "- a: dropless" in page
    assert "- u: questions" in page


def test_results_survive_json() -> None:
    models = [result("a", 0.5)]
    values = json.loads(json.dumps(comparison_json(models, {"limit": 3})))
    assert values["settings"] == {"limit": 3}
    assert read_models(values) == models


def test_held_out_loss_in_bits() -> None:
    loss = EvalResult(
        loss=1.5,
        loss_by_domain={"x": 1.0, "y": 2.0},
        tokens_by_domain={"x": 50, "y": 50},
        kept_fraction=0.75,
        selection="threshold",
        error=0.2,
        error_by_domain={"x": 0.1, "y": None},
    )
    scores = held_out_result(loss, {"x": 1.0, "y": 3.0}, "0").scores
    assert scores["all"]["bits/byte"].value == pytest.approx(1.5 / math.log(2) / 2.0)
    assert scores["all"]["bits/byte"].error == pytest.approx(0.2 / math.log(2) / 2.0)
    assert scores["all"]["kept share"].value == 0.75
    assert scores["y"]["bits/byte"].value == pytest.approx(2.0 / math.log(2) / 3.0)
    assert scores["y"]["bits/byte"].error is None


def test_the_error_of_a_ratio_is_its_spread_over_samples() -> None:
    generator = torch.Generator().manual_seed(0)

    def sample() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(20, 60, (200,), generator=generator)
        each = 2 + torch.randn(200, generator=generator, dtype=torch.float64) / 2
        return tokens * each, tokens

    ratios, errors = [], []
    for _ in range(300):
        nats, tokens = sample()
        ratios.append(float(nats.sum() / tokens.sum()))
        errors.append(ratio_error(nats, tokens))
    spread = torch.tensor(ratios).std().item()
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.15)
    assert ratio_error(torch.ones(1), torch.ones(1)) is None


def test_a_two_layer_model_and_a_dense_one(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained without thresholds, the sparse one evaluates dropless and says so."""
    ours = save(tmp_path / "ours", router="token_choice", capacity="none")
    dense = save(tmp_path / "dense")
    table, values = tmp_path / "out" / "table.md", tmp_path / "out" / "scores.json"
    files = ["--markdown", str(table), "--json", str(values)]
    assert main(["evaluate", str(ours), str(dense), *options, *files]) == 0
    out = capsys.readouterr().out
    assert "dropless selection: its experts do not rank tokens by a score, on which a" in out
    assert "no experts that select" in out
    assert "| task | category | measure | n | ours | dense |" in table.read_text()
    models = read_models(json.loads(values.read_text()))
    bits = [model.tasks[0].scores["all"]["bits/byte"] for model in models]
    assert all(0 < score.value < 20 and score.error for score in bits)
    assert bits[0].value != bits[1].value


def test_tasks_of_a_two_layer_model(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' (lm-eval) is not installed")
    folder = save(tmp_path / "ours", router="etr")
    questions = tmp_path / "q.jsonl"
    row = {"question": "two plus two is", "choices": ["four", "nine"], "answer": 0}
    rows = [row | {"category": category} for category in ("a", "b", "b")]
    questions.write_text("".join(json.dumps(r) + "\n" for r in rows))
    values = tmp_path / "scores.json"
    named = ["--tasks", "mmlu_dev", "questions", "bits_per_byte", "--limit", "6"]
    words = [*named, "--questions", str(questions), "--json", str(values), *options]
    assert main(["evaluate", str(folder), *words]) == 0
    assert "acc_norm" in capsys.readouterr().out
    (model,) = read_models(json.loads(values.read_text()))
    assert [task.task for task in model.tasks] == ["mmlu_dev", "questions", "bits_per_byte"]
    assert re.fullmatch(r"held-out text of corpus [0-9a-f]{16}", model.tasks[2].label)
    scores = model.tasks[1].scores
    assert list(scores) == ["all", "a", "b"]
    assert [scores[name]["acc"].count for name in scores] == [3, 1, 2]
    assert scores["a"]["acc"].value == scores["b"]["acc"].value
    for task in model.tasks:  # each holds what its means are of
        for measure, rows in task.rows.items():
            count = sum(task.weights or [1] * len(rows))
            assert sum(rows) / count == pytest.approx(task.scores["all"][measure].value)
    assert [len(task.rows) for task in model.tasks] == [2, 2, 1]
    assert len(paired([model, model])) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "gsm8k"], "task 'gsm8k' and its file go together"),
        (["--max-tokens-per-domain", "0"], "must be at least 1"),
    ],
)
def test_options_are_checked(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "absent", *words])
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_missing_file_shows_before_a_model_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "absent", "--tasks", "questions", "--questions", "none.jsonl"]) == 2
    assert "'none.jsonl' is not a file" in capsys.readouterr().err


def with_rows(name: str, *rows: tuple[float, int], digest: str = "same") -> ModelResult:
    task = TaskResult(
        task=HELD_OUT,
        label="text",
        scores={},
        rows={"nats/token": tuple(nats for nats, _ in rows)},
        weights=tuple(tokens for _, tokens in rows),
        digest=digest,
    )
    return ModelResult(model=name, folder=name, selection="dropless", tasks=[task] if rows else [])


def test_losses_are_paired_over_rows() -> None:
    """Rows differ by far more than models do: the difference is .1 in every token."""
    first = with_rows("a", (10.0, 10), (60.0, 20), (5.0, 10))
    second = with_rows("b", (11.0, 10), (62.0, 20), (6.0, 10))
    others = with_rows("c", (1.0, 10), digest="other"), with_rows("d")
    assert paired([first, second, *others]) == [
        "b against a: +0.1000 ± 0.0000 nats/token, paired over 3 rows of text"
    ]
    assert paired([second, first])[0].startswith("a against b: -0.1000")
    assert paired([first]) == paired([others[1], others[1]]) == []
    assert "against" in comparison_markdown([first, second])
    values = json.loads(json.dumps(comparison_json([first, second], {})))
    assert read_models(values) == [first, second]
    for name in ("rows", "weights", "digest"):  # of an earlier version
        del values["models"][0]["tasks"][0][name]
    assert paired(read_models(values)) == []
    uneven = with_rows("e", (11.0, 10), (62.0, 20), (8.0, 10))
    nats, tokens = torch.tensor([1.0, 2, 3]).double(), torch.tensor([10, 20, 10])
    assert f"± {ratio_error(nats, tokens):.4f}" in paired([first, uneven])[0]


def test_losses_of_other_tokens_are_not_paired() -> None:
    """As many in every row, as two byte-wise tokenizers may give; nor where a result says none."""
    rows = (10.0, 10), (60.0, 20)
    first, same = with_rows("a", *rows), with_rows("b", *rows)
    other, untold = with_rows("c", *rows, digest="other"), with_rows("d", *rows, digest="")
    counted = with_rows("e", (10.0, 5), (60.0, 10))  # by an objective that hides half of them
    assert len(paired([first, same, other, untold, counted])) == 1
    assert paired([untold, untold]) == []


@pytest.mark.parametrize("bounds", [(True, False), (False, True), (True, True)])
def test_a_bound_is_not_paired_with_a_loss(bounds: tuple[bool, bool]) -> None:
    found = [
        EvalResult(
            loss=1.5,
            loss_by_domain={"x": 1.5},
            tokens_by_domain={"x": 20},
            kept_fraction=1.0,
            selection="dropless",
            error_by_domain={"x": 0.1},
            rows=((12.0, 10), (18.0, 10)),
            digest="same",
            bound=bound,
        )
        for bound in bounds
    ]
    models = [
        ModelResult(model=name, folder="", selection="", tasks=[held_out_result(f, {"x": 1.0}, "")])
        for name, f in zip("ab", found, strict=True)
    ]
    told = ["b against a: +0.0000 ± 0.0000 nats/token (upper bound), paired over 2 rows of text"]
    assert paired(models) == (told if all(bounds) else [])


def answers(name: str, *values: float, digest: str = "same", task: str = "t") -> ModelResult:
    found = TaskResult(task=task, label="", scores={}, rows={"acc": values}, digest=digest)
    return ModelResult(model=name, folder="", selection="", tasks=[found])


def test_answers_are_paired_over_questions() -> None:
    """0, 1, 0, 1 more: .5, of standard deviation sqrt(1 / 3), and an error of half of that."""
    first, second = answers("a", 1, 0, 0, 0), answers("b", 1, 1, 0, 1)
    error = math.sqrt(1 / 3) / 2
    told = f"b against a: +0.5000 ± {error:.4f} acc of t, paired; 2 of 4 questions differ"
    assert paired([first, second]) == [told]
    assert paired([answers("a", 1), answers("b", 0)]) == [
        "b against a: -1.0000 acc of t, paired; 1 of 1 questions differ"
    ]
    assert paired([first, answers("c", 1, 1, 0, 1, digest="other")]) == []
    assert paired([first, answers("d", 1, 1, 0, 1, task="u")]) == []
    values = json.loads(json.dumps(comparison_json([first, second], {})))
    assert read_models(values) == [first, second]
