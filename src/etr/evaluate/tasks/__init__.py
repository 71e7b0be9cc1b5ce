"""Tasks on which models are evaluated, by name; none of them downloads anything.

A new task: a function that returns an `Exam`, and one line in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from etr.evaluate.embedding import Embedder
from etr.evaluate.tasks.base import ALL, Exam, Score, Scores, TaskResult
from etr.evaluate.tasks.choice import mmlu_dev, own_questions, teleqna
from etr.evaluate.tasks.written import gsm8k, humaneval, open_answers

HELD_OUT = "bits_per_byte"
"""Held-out text instead of questions; always there."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which tasks, and where their questions are."""

    tasks: tuple[str, ...] = (HELD_OUT,)
    """bits_per_byte, mmlu_dev, humaneval, teleqna, gsm8k, questions, open_answers, and any task of
    lm-evaluation-harness whose data is on this machine."""
    limit: int | None = None
    """Most questions of each task, at equal distances; all by default."""
    max_new_tokens: int = 256
    """Longest generated answer, tokens."""
    chat: bool = False
    """Put questions as a user's turn of the tokenizer's chat template."""
    teleqna: str | None = None
    """The authors' encrypted TeleQnA.zip; read in memory."""
    gsm8k: str | None = None
    """JSON lines with question and answer, the latter ending in "#### number"."""
    questions: str | None = None
    """Multiple choice of one's own: JSON lines with question, choices, answer (its place from 0),
    category."""
    open_answers: str | None = None
    """Open questions of one's own: JSON lines with question, answer, category."""
    embedder: str | None = None
    """Folder of the transformers model whose embeddings compare open answers."""
    task_path: str | None = None
    """Folder of tasks of one's own for lm-evaluation-harness, as its YAML files."""

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks={self.tasks!r} must name one task or more, each once")
        for name in ("limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("teleqna", "gsm8k", "questions", "open_answers"):
            if (getattr(self, name) is not None) != (name in self.tasks):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} and tasks={self.tasks!r} do not agree: task "
                    f"{name!r} and its file go together"
                )
        if (self.embedder is None) != (self.open_answers is None):
            raise ValueError(
                f"embedder={self.embedder!r} and open_answers={self.open_answers!r} go together"
            )

    def local(self) -> list[Exam]:
        """The tasks of the table that are asked for.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file is not what it should be, or a task's package is not installed.
        """
        return [EXAMS[name](self) for name in self.tasks if name in EXAMS]

    @property
    def named(self) -> tuple[str, ...]:
        """The tasks that only the harness can know."""
        return tuple(name for name in self.tasks if name not in EXAMS and name != HELD_OUT)


EXAMS: dict[str, Callable[[TaskConfig], Exam]] = {
    "mmlu_dev": lambda c: mmlu_dev(c.limit),
    "teleqna": lambda c: teleqna(c.teleqna or "", c.limit),
    "questions": lambda c: own_questions(c.questions or "", c.limit),
    "humaneval": lambda c: humaneval(c.limit, c.max_new_tokens),
    "gsm8k": lambda c: gsm8k(c.gsm8k or "", c.limit, c.max_new_tokens),
    "open_answers": lambda c: open_answers(
        c.open_answers or "", Embedder(c.embedder or ""), c.limit, c.max_new_tokens
    ),
}
"""Builders by name: each makes a task's questions of the config."""

__all__ = [
    "ALL",
    "HELD_OUT",
    "TASKS",
    "Exam",
    "Score",
    "Scores",
    "TaskConfig",
    "TaskResult",
    "gsm8k",
    "humaneval",
    "mmlu_dev",
    "open_answers",
    "own_questions",
    "teleqna",
]
