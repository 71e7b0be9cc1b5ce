"""`etr evaluate`: held-out bits per byte and tasks, of one model or several side by side."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from etr.cli._model import open_any_model
from etr.cli._of_run import objective_for, parse_with_text
from etr.cli._options import WithImports
from etr.cli._tables import make_table
from etr.data import DataConfig, held_out_batches, open_data
from etr.evaluate import (
    Exam,
    ModelResult,
    TaskConfig,
    TaskResult,
    comparison_json,
    comparison_markdown,
    describe_selection,
    evaluate,
    run_tasks,
)
from etr.evaluate.comparison import columns, held_out_result, paired, score_rows
from etr.evaluate.harness import check_named, run_named
from etr.evaluate.tasks import HELD_OUT
from etr.files import write_json, write_text
from etr.model import OBJECTIVES, Objective
from etr.moe.serving import serving_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(WithImports):
    """What to evaluate, and on what."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Checkpoints or run folders; also plain transformers models."""
    tasks: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    """Text; its held-out documents are used. That of the run by default. The tokenizer is the
    model's own."""
    selection: str = "threshold"
    """How experts select: threshold, dropless, batch or another name in SERVING, perhaps with
    options. batch lets
    later tokens change earlier ones, which is not an honest loss."""
    objective: str | None = None
    """What the loss is of, e.g. causal; by default what the run was trained on."""
    max_tokens_per_domain: int | None = None
    """Most held-out tokens of each domain; all by default."""
    json: str | None = None
    """Also write all scores to this file."""
    markdown: str | None = None
    """Also write the table to this file."""

    def __post_init__(self) -> None:
        serving_of(self.selection, "selection")
        if not self.models:
            raise ValueError("models=() must name a checkpoint or a run's folder")
        limit = self.max_tokens_per_domain
        if limit is not None and limit < 1:
            raise ValueError(f"max_tokens_per_domain={limit} must be at least 1")
        if self.objective is not None:
            OBJECTIVES.parse(self.objective)


def run(arguments: list[str]) -> int:
    """Evaluate, print a table, and write it where asked."""
    config = parse_with_text(
        EvaluateConfig,
        "evaluate",
        arguments,
        lambda c: c.models if HELD_OUT in c.tasks.tasks else (),
    )
    # A missing file or an unknown name shows before a model is read.
    tasks = config.tasks.local()
    check_named(config.tasks.named, config.tasks.task_path)
    results = []
    for path, name in zip(config.models, names_of(config.models), strict=True):
        result = evaluate_model(config, path, name, tasks)
        results.append(result)
        print(f"{result.model} ({result.folder}): {result.selection}")
    Console().print(screen_table(results))
    for sentence in paired(results):
        print(sentence)
    if not serving_of(config.selection).causal:
        print(
            f"{config.selection} selection: later tokens change earlier ones; do not report this "
            "as a loss"
        )
    if config.json is not None:
        settings = dataclasses.asdict(config)
        write_json(Path(config.json), comparison_json(results, settings))
        print(f"written: {config.json}")
    if config.markdown is not None:
        write_text(Path(config.markdown), comparison_markdown(results))
        print(f"written: {config.markdown}")
    return 0


def evaluate_model(config: EvaluateConfig, path: str, name: str, tasks: list[Exam]) -> ModelResult:
    """All tasks on one model."""
    model, tokenizer, folder = open_any_model(path)
    objective = objective_for(config.objective, path, tokenizer)
    options: dict[str, Any] = {
        "batch_size": config.data.batch_size,
        "chat": config.tasks.chat,
        "selection": config.selection,
    }
    found: list[TaskResult] = []
    if HELD_OUT in config.tasks.tasks:
        found.append(held_out(config, objective, model, tokenizer, folder))
    found += run_tasks(model, tokenizer, tasks, **options)
    found += run_named(
        model,
        tokenizer,
        config.tasks.named,
        task_path=config.tasks.task_path,
        limit=config.tasks.limit,
        **options,
    )
    order = {task: place for place, task in enumerate(config.tasks.tasks)}
    return ModelResult(
        model=name,
        folder=str(folder),
        selection=describe_selection(model, config.selection, objective),
        tasks=sorted(found, key=lambda result: order.get(result.task, len(order))),
    )


def held_out(
    config: EvaluateConfig,
    objective: Objective,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> TaskResult:
    """Held-out loss as a task."""
    data = open_data(dataclasses.replace(config.data, tokenizer=str(folder)))
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model "
            f"vocab_size={model.config.vocab_size}: they do not belong together"
        )
    batches = held_out_batches(
        data.dataset,
        config.data.sequence_length,
        config.data.batch_size,
        config.max_tokens_per_domain,
    )
    domains = data.dataset.domains
    result = evaluate(model, batches, domains, config.selection, objective=objective)
    return held_out_result(result, data.dataset.bytes_per_token, data.corpus)


def names_of(paths: tuple[str, ...]) -> list[str]:
    """Names of the folders, or their whole paths where two have the same."""
    short = [Path(path).resolve().name for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def screen_table(results: list[ModelResult]) -> Table:
    """The table for a terminal."""
    names = columns(results)
    table = make_table(*names, words=names[:3])
    last = ""
    for row in score_rows(results):
        if last and row.task != last:
            table.add_section()
        last = row.task
        table.add_row(*row.cells())
    return table
