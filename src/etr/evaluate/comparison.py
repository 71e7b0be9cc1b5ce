"""Scores of several models side by side, as JSON and as one table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from etr.evaluate.held_out import EvalResult, ratio_error
from etr.evaluate.tasks import ALL, HELD_OUT, Score, Scores, TaskResult
from etr.sheet import table


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """What one model scored."""

    model: str
    """Its name in the table."""
    folder: str
    """Where it was read from."""
    selection: str
    """How its experts selected, in words."""
    tasks: list[TaskResult]
    """Results, in the order asked for."""


@dataclass(frozen=True, kw_only=True)
class ScoreRow:
    """One measure of one category of one task; cells by model, None where it was not measured."""

    task: str
    category: str
    measure: str
    count: int
    scores: tuple[Score | None, ...]

    def cells(self) -> list[str]:
        """As text."""
        scores = ["-" if score is None else str(score) for score in self.scores]
        return [self.task, self.category, self.measure, f"{self.count:,}", *scores]


def held_out_result(
    result: EvalResult, bytes_per_token: dict[str, float], corpus: str
) -> TaskResult:
    """Held-out loss as a task; its questions are tokens, its sample rows of text.

    Args:
        result: of `evaluate`.
        bytes_per_token: of each domain.
        corpus: fingerprint of the text.
    """
    tokens = result.tokens_by_domain
    count = sum(tokens.values())
    mean_bytes = sum(n * bytes_per_token[name] for name, n in tokens.items()) / count
    suffix = " (upper bound)" if result.bound else ""
    scores: Scores = {ALL: _nats_and_bits(result.loss, result.error, count, mean_bytes, suffix)}
    if result.asked_loss is not None:
        scores[ALL]["nats/token to find"] = Score(value=result.asked_loss, error=None, count=count)
    for name, value in {"kept share": result.kept_fraction, **result.counted}.items():
        scores[ALL][name] = Score(value=value, error=None, count=count)
    for name, loss in result.loss_by_domain.items():
        error = result.error_by_domain[name]
        scores[name] = _nats_and_bits(loss, error, tokens[name], bytes_per_token[name], suffix)
    return TaskResult(
        task=HELD_OUT,
        label=f"held-out text of corpus {corpus}",
        scores=scores,
        rows={f"nats/token{suffix}": tuple(nats for nats, _ in result.rows)},
        weights=tuple(tokens for _, tokens in result.rows),
        digest=result.digest,
    )


def _nats_and_bits(
    loss: float, error: float | None, count: int, bytes_per_token: float, suffix: str
) -> dict[str, Score]:
    scale = 1 / math.log(2) / bytes_per_token
    bits = None if error is None else error * scale
    return {
        f"bits/byte{suffix}": Score(value=loss * scale, error=bits, count=count),
        f"nats/token{suffix}": Score(value=loss, error=error, count=count),
    }


def score_rows(models: Sequence[ModelResult]) -> list[ScoreRow]:
    """Every measure that any model has, in the order of the first that has it."""
    by_model = [
        {
            (task.task, category, measure): score
            for task in model.tasks
            for category, scores in task.scores.items()
            for measure, score in scores.items()
        }
        for model in models
    ]
    keys = dict.fromkeys(key for scores in by_model for key in scores)
    rows = []
    for key in keys:
        scores = tuple(found.get(key) for found in by_model)
        count = next(score.count for score in scores if score is not None)
        rows.append(
            ScoreRow(task=key[0], category=key[1], measure=key[2], count=count, scores=scores)
        )
    return rows


def columns(models: Sequence[ModelResult]) -> list[str]:
    """Heads of the table."""
    return ["task", "category", "measure", "n", *(model.model for model in models)]


def paired(models: Sequence[ModelResult]) -> list[str]:
    """How much more each model scores than the first, row by row of text and question by question,
    in sentences.

    On the same rows the difference is known much better than both scores. A task is left out where
    a model cut the text into other tokens, counted others of them, was asked other questions or
    does not tell; and a bound is not paired with a loss.
    """
    first, *others = models
    return [
        sentence
        for other in others
        for mine in first.tasks
        for theirs in other.tasks
        if mine.task == theirs.task
        for sentence in _differences(f"{other.model} against {first.model}", theirs, mine)
    ]


def _differences(who: str, task: TaskResult, first: TaskResult) -> Iterator[str]:
    if not first.digest or (task.digest, task.weights) != (first.digest, first.weights):
        return
    for measure in (name for name in first.rows if name in task.rows):
        pairs = list(zip(task.rows[measure], first.rows[measure], strict=True))
        more = torch.tensor([a - b for a, b in pairs], dtype=torch.float64)
        weights = torch.tensor(first.weights or [1] * len(pairs))
        error = ratio_error(more, weights)
        found = f"{float(more.sum() / weights.sum()):+.4f}"
        found += "" if error is None else f" ± {error:.4f}"
        if task.task == HELD_OUT:
            yield f"{who}: {found} {measure}, paired over {len(pairs)} rows of text"
        else:
            unequal = f"{int(more.count_nonzero())} of {len(pairs)} questions differ"
            yield f"{who}: {found} {measure} of {task.task}, paired; {unequal}"


def comparison_markdown(models: Sequence[ModelResult]) -> str:
    """One table for all models, with standard errors, and how each model's experts selected."""
    lines = [
        table(columns(models), (row.cells() for row in score_rows(models)), "lllr"),
        *(f"- {model.model}: {model.selection}" for model in models),
    ]
    labels = {task.task: task.label for model in models for task in model.tasks}
    lines += [f"- {task}: {label}" for task, label in labels.items()]
    lines += [f"- {sentence}" for sentence in paired(models)]
    lines += ["", "After ±: the standard error of the mean over questions or rows of text."]
    return "\n".join(lines) + "\n"


def comparison_json(models: Sequence[ModelResult], settings: dict[str, Any]) -> dict[str, Any]:
    """Plain values: what was asked for, and every score.

    Args:
        models: results.
        settings: how it was run.
    """
    return {"format": 1, "settings": settings, "models": [dataclasses.asdict(m) for m in models]}


def read_models(values: dict[str, Any]) -> list[ModelResult]:
    """The models of what `comparison_json` wrote."""
    return [
        ModelResult(
            **{
                **model,
                "tasks": [
                    TaskResult(
                        task=task["task"],
                        label=task["label"],
                        scores={
                            category: {name: Score(**score) for name, score in scores.items()}
                            for category, scores in task["scores"].items()
                        },
                        rows={name: tuple(row) for name, row in task.get("rows", {}).items()},
                        weights=tuple(task.get("weights", ())),
                        digest=task.get("digest", ""),
                    )
                    for task in model["tasks"]
                ],
            }
        )
        for model in values["models"]
    ]
