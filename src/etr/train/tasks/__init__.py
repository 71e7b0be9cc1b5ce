"""What a run trains on: a model, batches, and a loss for every token."""

from etr.train.tasks.base import Forward, Task, backward
from etr.train.tasks.language import LanguageTask
from etr.train.tasks.teacher import TeacherTask
from etr.train.tasks.text_x import TextXTask

__all__ = ["Forward", "LanguageTask", "Task", "TeacherTask", "TextXTask", "backward"]
