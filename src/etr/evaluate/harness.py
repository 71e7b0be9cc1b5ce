"""Running tasks through lm-evaluation-harness, without a network."""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from etr.data.chat import ChatTemplate
from etr.data.tokenizer import encode_prompt
from etr.evaluate.tasks.base import ALL, Exam, Score, TaskResult, by_category, require
from etr.moe import selecting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHOICE_MEASURES = ("acc_norm", "acc")
"""Scores of multiple choice: log-likelihood over the choice's length in characters, and without."""


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Exam],
    *,
    batch_size: int = 8,
    chat: bool = False,
    selection: str = "threshold",
) -> list[TaskResult]:
    """Put every question of every task to a model; its mode and selection are restored.

    Args:
        model: a causal language model, on its own device.
        tokenizer: the model's.
        tasks: see `etr.evaluate.tasks`.
        batch_size: sequences at once.
        chat: put questions through the tokenizer's chat template.
        selection: how experts select.
    Raises:
        ValueError: lm-eval is not installed, or the tokenizer has no chat template or one that
            fails.
    """
    if not tasks:
        return []
    _check(tokenizer, chat)
    wanted: list[Any] = [_as_harness_task(task) for task in tasks]
    found = _simple_evaluate(
        model, tokenizer, wanted, batch_size, chat, selection, include_defaults=False
    )
    return [_own_result(task, found["samples"][task.name]) for task in tasks]


def run_named(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    task_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    chat: bool = False,
    selection: str = "threshold",
) -> list[TaskResult]:
    """Run tasks that the harness knows by name, or by YAML files of one's own.

    Args:
        names: of tasks or groups; their data must be on this machine.
        task_path: folder of YAML files, beside the harness's own.
        limit: most questions, the first ones.
    Raises:
        ValueError: lm-eval is not installed, a task is unknown, or its data is not here.
    """
    if not names:
        return []
    _check(tokenizer, chat)
    try:
        found = _simple_evaluate(
            model, tokenizer, list(names), batch_size, chat, selection,
            include_defaults=task_path is None, include_path=task_path, limit=limit,
        )  # fmt: skip
    except (KeyError, OSError) as error:
        raise ValueError(
            f"tasks={tuple(names)!r}: lm-evaluation-harness does not know them, or their data is "
            f"not on this machine ({type(error).__name__}: {error})"
        ) from error
    counts = found.get("n-samples", {})
    return [
        _named_result(
            name, values, counts.get(name, {}).get("effective", 0), found["samples"].get(name, [])
        )
        for name, values in found["results"].items()
    ]


def check_named(names: Sequence[str], task_path: str | None = None) -> None:
    """Refuse names that the harness does not know, before any model is read.

    Args:
        names: of tasks or groups.
        task_path: as in `run_named`.
    Raises:
        ValueError: lm-eval is not installed, or a task is unknown.
    """
    if not names:
        return
    require("lm_eval", "lm-eval")
    with offline():
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=task_path, include_defaults=task_path is None)
        unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(
            f"tasks: {', '.join(unknown)} is neither a task of this library nor one of "
            "lm-evaluation-harness"
        )


def _check(tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ValueError("chat=True, and the tokenizer has no chat template; leave it off")
    if list(tokenizer("a")["input_ids"]) != encode_prompt(tokenizer, "a"):
        raise ValueError(
            "the tokenizer puts a token after every text, and answers would follow an end; save it "
            "with add_eos_token=False"
        )
    require("lm_eval", "lm-eval")


def _simple_evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    batch_size: int,
    chat: bool,
    selection: str,
    *,
    include_defaults: bool,
    include_path: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    import lm_eval

    with offline(), selecting(model, selection), ChatTemplate(tokenizer) as template:
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        harness_model: Any = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            device=str(model.device),
            batch_size=batch_size,
            # As the tokenizer begins texts; a chat template writes the beginning itself.
            add_bos_token=not chat,
            prefix_token_id=encode_prompt(tokenizer, "")[-1],
        )
        harness_model.apply_chat_template = partial(_write_chat, template)
        manager = TaskManager(include_path=include_path, include_defaults=include_defaults)
        found = lm_eval.simple_evaluate(
            model=harness_model,
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat,
            bootstrap_iters=1000 if include_defaults or include_path else 0,
            log_samples=True,
        )
    assert found is not None
    result: dict[str, Any] = dict(found)
    return result


def _write_chat(
    template: ChatTemplate, turns: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """Do as the harness does: try without system turns where a template refuses them."""
    options = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": not add_generation_prompt,
    }
    others = [turn for turn in turns if turn["role"] != "system"]
    try:
        return template.write([(turns, options)])[0]
    except ValueError:
        if len(others) == len(turns):
            raise
        return template.write([(others, options)])[0]


def _as_harness_task(task: Exam) -> dict[str, Any]:
    """A task in the words of the harness's configuration."""
    import datasets

    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(task.questions)},
        "test_split": "test",
        "doc_to_text": lambda doc: doc["prompt"],
        "num_fewshot": 0,
    }
    if task.score is None:
        return config | {
            "output_type": "multiple_choice",
            "doc_to_choice": lambda doc: doc["choices"],
            "doc_to_target": lambda doc: doc["answer"],
            "metric_list": [{"metric": name} for name in CHOICE_MEASURES],
        }
    score = task.score
    return config | {
        "output_type": "generate_until",
        "doc_to_target": lambda doc: "",
        "generation_kwargs": {
            "until": list(task.until),
            "max_gen_toks": task.max_new_tokens,
            "do_sample": False,
        },
        "process_results": lambda doc, answers: score(doc, answers[0]),
        "metric_list": [],
    }


def _own_result(task: Exam, samples: list[dict[str, Any]]) -> TaskResult:
    in_order = sorted(samples, key=lambda sample: sample["doc_id"])
    rows = [
        (sample["doc"]["category"], {name: float(sample[name]) for name in sample["metrics"]})
        for sample in in_order
    ]
    return TaskResult(
        task=task.name,
        label=task.label,
        scores=by_category(rows),
        rows={name: tuple(values[name] for _, values in rows) for name in rows[0][1]},
        digest=_digest(in_order),
    )


def _named_result(
    name: str, values: dict[str, Any], count: int, samples: list[dict[str, Any]]
) -> TaskResult:
    """Measures as the harness reports them: "acc,none" and "acc_stderr,none"."""
    scores, rows, digest = {}, {}, ""
    for key, value in values.items():
        measure, comma, kind = key.partition(",")
        if not comma or measure.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{measure}_stderr,{kind}")
        label = measure if kind == "none" else f"{measure} ({kind})"
        known = isinstance(error, int | float)
        scores[label] = Score(value=value, error=error if known else None, count=count)
        in_order = [s for s in sorted(samples, key=lambda s: s["doc_id"]) if s["filter"] == kind]
        each = [sample.get(measure) for sample in in_order]
        numbers = [float(one) for one in each if isinstance(one, int | float)]
        # Not where the harness makes something else of a task's questions than their mean.
        if len(numbers) == len(each) > 0 and math.isclose(fmean(numbers), value, abs_tol=1e-9):
            rows[label], digest = tuple(numbers), _digest(in_order)
    label = f"{name} of lm-evaluation-harness"
    return TaskResult(task=name, label=label, scores={ALL: scores}, rows=rows, digest=digest)


def _digest(samples: list[dict[str, Any]]) -> str:
    """Of the questions, in order."""
    return hashlib.sha256("".join(s["doc_hash"] for s in samples).encode()).hexdigest()


@contextmanager
def offline() -> Iterator[None]:
    """Keep Hugging Face's libraries from the network, and the harness from talking."""
    import datasets
    import huggingface_hub.constants

    switches = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (datasets.config, "HF_DATASETS_OFFLINE"),
    ]
    before = [getattr(module, name) for module, name in switches]
    logger = logging.getLogger("lm_eval")
    level = logger.level
    for module, name in switches:
        setattr(module, name, True)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lm_eval")
            yield
    finally:
        logger.setLevel(level)
        for (module, name), value in zip(switches, before, strict=True):
            setattr(module, name, value)
