"""`etr compose`: one model of several that share a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from etr.cli._model import open_model
from etr.cli._of_run import objective_of, parse_with_text
from etr.cli._options import WithImports
from etr.cli._progress import steps_progress
from etr.cli._tables import make_table
from etr.hf import EtrForCausalLM
from etr.model import COMPOSITIONS, Causal
from etr.model.composition import PromptComposition, TokenComposition
from etr.train.checkpoint_folder import find_model
from etr.train.compose import ComposeConfig, Outcome, compose_by_prompt
from etr.train.folders import making
from etr.train.fuse import compose_by_token


@dataclass(frozen=True, kw_only=True)
class ComposeArguments(ComposeConfig, WithImports):
    """Which models to compose, and how."""

    name: Annotated[str, tyro.conf.Positional]
    """Composition, perhaps with options: composition:budget=20. `etr methods` lists them."""
    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Checkpoints or runs' folders, with one tokenizer."""
    out: str = "runs/composed"
    """New folder, which `etr generate` takes; the models that are kept are copied into it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        COMPOSITIONS.parse(self.name)


def run(arguments: list[str]) -> int:
    """Compose, save, and print what the composed model does on held-out text."""
    config = parse_with_text(ComposeArguments, "compose", arguments, lambda c: c.models)
    composition, out = COMPOSITIONS.parse(config.name), Path(config.out)
    if not config.models:
        raise ValueError("name the models to compose")
    for path in (*config.models, *([] if config.start is None else [config.start])):
        if objective_of(path) != Causal.name:
            raise ValueError(
                f"{path} was trained on {objective_of(path)}: models that are composed write the "
                "next token"
            )
    with making(out):
        if out.exists():
            raise ValueError(f"out={config.out!r} exists already; name a new folder")
        folders = [find_model(path) for path in config.models]
        given = (folders, _load, config, out, config.imports)
        if isinstance(composition, TokenComposition):
            steps = sum(phase.steps for phase in composition.phases)
            with steps_progress("training", steps) as show:
                outcome = compose_by_token(composition, *given, show)
        else:
            assert isinstance(composition, PromptComposition)
            outcome = compose_by_prompt(composition, *given)
    Console().print(losses_table(outcome))
    for note in outcome.notes:
        print(note)
    print(f"saved: {out}; etr generate {out} --prompt TEXT")
    return 0


def _load(folder: Path) -> EtrForCausalLM:
    return open_model(str(folder))[0]


def losses_table(outcome: Outcome) -> Table:
    """A row for each model, a column for each domain."""
    title = "held-out nats/token"
    first = next(iter(outcome.losses.values()))
    table = make_table(title, *first, words=(title,))
    for name, losses in outcome.losses.items():
        table.add_row(name, *(f"{loss:.4f}" for loss in losses.values()))
    return table
