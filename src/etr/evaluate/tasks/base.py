"""What a task is: questions, how they are put, and how answers are scored."""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from etr.data.reading import read_rows

T = TypeVar("T")
ALL = "all"
"""The category that holds every question."""
Scorer = Callable[[dict[str, Any], str], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean over questions."""

    value: float
    """Mean."""
    error: float | None
    """Its standard error, s / sqrt(n); None for one question, or where nothing is sampled."""
    count: int
    """Questions, or tokens."""

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.error is None else f"{self.value:.4f} ± {self.error:.4f}"


Scores = dict[str, dict[str, Score]]
"""Scores by category, then by measure."""


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Questions of one kind."""

    name: str
    """Name on the command line."""
    label: str
    """What it is, for tables; says what it is not where a name could mislead."""
    questions: list[dict[str, Any]]
    """Dictionaries with "prompt", "category", and either "choices" and "answer" (the place of
    the right one) or whatever `score` reads."""
    score: Scorer | None = None
    """(question, generated text) -> values by measure; None for multiple choice, which is
    scored by the likelihood of the choices."""
    until: tuple[str, ...] = ()
    """Texts that end a generated answer."""
    max_new_tokens: int = 256
    """Most tokens of a generated answer."""

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError(f"task {self.name!r} has no questions")


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a model scored on one task."""

    task: str
    """Name of the task."""
    label: str
    """Label of the task."""
    scores: Scores
    """Scores by category ("all" first), then by measure."""
    rows: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """By measure, the sum of each row of text or the value of each question, in order; of measures
    that are means of these."""
    weights: tuple[int, ...] = ()
    """Tokens of each row of text; empty for questions, which weigh 1."""
    digest: str = ""
    """Of what was asked: rows of two results pair where it is the same; empty where none do."""


def require(module: str, package: str) -> Any:
    """Import what a task needs.

    Raises:
        ValueError: it is not installed; says how.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"this task needs the package {package}: pip install 'etr-moe[eval]' ({error})"
        ) from error


def mean_score(values: Sequence[float]) -> Score:
    """Mean and standard error of independent values."""
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else None
    return Score(value=statistics.fmean(values), error=error, count=count)


def by_category(rows: Sequence[tuple[str, dict[str, float]]]) -> Scores:
    """Scores of all questions, and of each category where there are several.

    Args:
        rows: category (may be empty) and values by measure of each question.
    """
    groups: dict[str, list[dict[str, float]]] = {ALL: [values for _, values in rows]}
    names = sorted({category for category, _ in rows if category})
    if len(names) > 1:
        groups |= {name: [v for category, v in rows if category == name] for name in names}
    return {
        name: {measure: mean_score([row[measure] for row in group]) for measure in group[0]}
        for name, group in groups.items()
    }


def spread(items: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` items at equal distances, so that categories keep about their shares."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def read_lines(path: str | Path, fields: dict[str, type]) -> list[dict[str, Any]]:
    """Objects of a file, each with the fields named.

    Args:
        path: JSON lines, a JSON array or Parquet.
        fields: the type of each.
    Raises:
        FileNotFoundError: no such file.
        ValueError: no object in it, or one that is no JSON or lacks a field, with its line or row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a file; give one of JSON lines")
    found = []
    for where, values in read_rows(path):
        if not isinstance(values, dict):
            raise ValueError(f"{where}: must be a JSON object")
        for name, kind in fields.items():
            if not isinstance(values.get(name), kind) or isinstance(values[name], bool):
                raise ValueError(
                    f"{where}: {name}={values.get(name)!r} must be of type {kind.__name__}"
                )
        found.append(values)
    if not found:
        raise ValueError(f"{path} holds no question")
    return found
