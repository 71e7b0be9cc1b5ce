"""Evaluation: held-out loss by domain, tasks, kept shares, score histograms, calibration."""

from etr.evaluate.calibrate import calibrate
from etr.evaluate.comparison import ModelResult, comparison_json, comparison_markdown
from etr.evaluate.harness import run_tasks
from etr.evaluate.held_out import EvalResult, describe_selection, evaluate
from etr.evaluate.scores import score_densities
from etr.evaluate.tasks import EXAMS, Exam, TaskConfig, TaskResult

Task, TASKS = Exam, EXAMS  # their names in earlier versions

__all__ = [
    "EXAMS",
    "TASKS",
    "EvalResult",
    "Exam",
    "ModelResult",
    "Task",
    "TaskConfig",
    "TaskResult",
    "calibrate",
    "comparison_json",
    "comparison_markdown",
    "describe_selection",
    "evaluate",
    "run_tasks",
    "score_densities",
]
