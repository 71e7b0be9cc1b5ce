"""Tasks on which routers are studied: one line each in `TASKS`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from etr.study.tasks.base import Forward, Task, backward
from etr.study.tasks.language import LanguageTask, language_model
from etr.study.tasks.teacher import TeacherTask, teacher
from etr.study.tasks.text_x import TextXTask, text_x
from etr.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """A task in the table.

    Args:
        summary: what it is, in a line.
        config: the run that all rows start from, by its number of steps.
        open: makes the task for such a config.
    """

    summary: str
    config: Callable[[int], TrainConfig]
    open: Callable[[TrainConfig], Task]


TASKS: dict[str, TaskEntry] = {
    "text-x": TaskEntry(
        summary="real text; eight-byte window and one attention layer before one MoE layer",
        config=text_x,
        open=TextXTask,
    ),
    "teacher-50": TaskEntry(
        summary="16 domain networks to imitate; half of the tokens are easy",
        config=teacher,
        open=lambda config: TeacherTask(easy=0.5),
    ),
    "teacher-70": TaskEntry(
        summary="16 domain networks to imitate; 70 % of the tokens are easy",
        config=teacher,
        open=lambda config: TeacherTask(easy=0.7),
    ),
    "lm": TaskEntry(
        summary="language model with four MoE layers",
        config=language_model,
        open=LanguageTask,
    ),
}


@functools.lru_cache(maxsize=4)
def open_task(name: str, config: TrainConfig) -> Task:
    """The task of a name, opened once per process and data.

    Raises:
        ValueError: no such task.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r} is unknown; choose one of {', '.join(TASKS)}")
    return TASKS[name].open(config)


__all__ = ["TASKS", "Forward", "Task", "TaskEntry", "backward", "open_task"]
