"""Tasks on which routers are studied: one line each in `TASKS`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from etr.data import Batch, DataConfig, TokenLoader, open_data
from etr.train import ModelConfig, OptimizerConfig, RoutingOptions, TrainConfig
from etr.train.tasks import LanguageTask, Task, TeacherTask, TextXTask

OWN_READERS = 4
"""Equal parts of a batch of `text-x-own`, each of its own domains: ranks that one process plays."""


class OwnTextTask(TextXTask):
    """`text-x`, of which each part of a batch reads domains of its own."""

    def training_batches(  # type: ignore[override]
        self, config: TrainConfig, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Batches of one reader's rows after the other's.

        Raises:
            ValueError: for more than one rank, or rows that readers cannot share equally.
        """
        rows = config.data.batch_size
        if world_size != 1 or rows % OWN_READERS:
            raise ValueError(
                f"batch_size={rows}, world_size={world_size}: {OWN_READERS} readers share the "
                "rows of one process equally"
            )
        domains = self.data.dataset.domains
        loaders = [
            TokenLoader(
                self.data.dataset,
                sequence_length=config.data.sequence_length,
                batch_size=rows // OWN_READERS,
                seed=config.seed,
                domain_weights={
                    name: float(place % OWN_READERS == reader) for place, name in enumerate(domains)
                },
            )
            for reader in range(OWN_READERS)
        ]
        while True:
            parts = [vars(next(loader)) for loader in loaders]
            yield Batch(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """A task in the table."""

    summary: str
    """What it is, in a line."""
    config: Callable[[int], TrainConfig]
    """The run that all rows start from, by its number of steps."""
    open: Callable[[TrainConfig], Task]
    """Makes the task for such a config."""


def held_out_tokens(steps: int) -> int:
    """Held-out tokens of each domain per evaluation; runs too short to conclude from take few."""
    return 8192 if steps >= 100 else 256


def text_x(steps: int = 1000) -> TrainConfig:
    """H 96, eight experts 192 wide, 2048 tokens a step."""
    return _config(steps, 96, 1, 2, 192, held_out_tokens(steps), weight_decay=0.0)


def teacher(steps: int = 1000) -> TrainConfig:
    """H 64, eight experts 96 wide, 2048 tokens a step."""
    return _config(steps, 64, 1, 1, 96, weight_decay=0.0)


def language_model(steps: int = 1000) -> TrainConfig:
    """The demo's decoder with four MoE layers, twice as wide inside its experts."""
    return _config(steps, 128, 4, 4, 512, held_out_tokens(steps))


def _config(
    steps: int,
    width: int,
    layers: int,
    heads: int,
    expert_size: int,
    eval_tokens: int = TrainConfig.eval_tokens_per_domain,
    **optimizer: Any,
) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(sequence_length=256, batch_size=8),
        model=ModelConfig(
            hidden_size=width,
            num_layers=layers,
            num_heads=heads,
            num_key_value_heads=heads,
            routing=RoutingOptions(num_experts=8, expert_size=expert_size),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20, **optimizer),
        steps=steps,
        eval_tokens_per_domain=eval_tokens,
    )


TASKS: dict[str, TaskEntry] = {
    "text-x": TaskEntry(
        summary="real text; eight-byte window and one attention layer before one MoE layer",
        config=text_x,
        open=lambda config: TextXTask(open_data(config.data)),
    ),
    "text-x-own": TaskEntry(
        summary="text-x of which each quarter of a batch reads domains of its own",
        config=text_x,
        open=lambda config: OwnTextTask(open_data(config.data)),
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
        open=lambda config: LanguageTask(open_data(config.data)),
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
