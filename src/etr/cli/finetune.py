"""`etr finetune`: a model learns its old router's choices, or to predict as its teacher does."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from etr.cli._model import open_any_model, open_model
from etr.cli._of_run import objective_for, parse_with_text
from etr.cli._options import WithImports
from etr.cli._progress import steps_progress
from etr.cli._tables import make_table
from etr.data import open_data
from etr.files import write_json
from etr.hf.convert import write_model
from etr.train.folders import making
from etr.train.model import SaveDtype
from etr.train.recover import MEASURED_AT, RecoverConfig, Recovery, recover
from etr.train.teach import Taught, teach


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RecoverConfig, WithImports):
    """Which model to fine-tune, and how."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder that `etr convert --router keep` wrote, or a run with router token_choice."""
    recover: bool = False
    """Swap the linear routers for ETR ones and teach them the old choices."""
    teacher: str | None = None
    """In place of --recover: the model that this one was made of by etr transform. Trains what the
    experts have to train (routers of bits, vectors, factors, weights) to predict as it does, and
    nothing else; of the options --steps, --learning-rate and the text are of use."""
    out: str = "runs/recovered"
    """New folder for the model, with recover.json or teach.json beside it."""
    save_dtype: SaveDtype = "float32"
    """float32: weights as trained, and as the losses were measured. checkpoint: rounded to the
    data type that they came in; thresholds stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recover == (self.teacher is not None):
            raise ValueError(
                "say --recover, or name a --teacher; for conversations use `etr sft`, for text any "
                "trainer of transformers"
            )


def run(arguments: list[str]) -> int:
    """Recover or teach, save, and print the losses."""
    config = parse_with_text(FinetuneConfig, "finetune", arguments, lambda c: (c.model,))
    out = Path(config.out)
    with making(out):
        if out.exists():
            raise ValueError(f"out={config.out!r} exists already; name a new folder")
        model, tokenizer, folder = open_model(config.model)
        dtype = model.dtype
        data = open_data(dataclasses.replace(config.data, tokenizer=str(folder)))
        found: Recovery | Taught
        if config.teacher is None:
            with steps_progress("recovering", config.total_steps) as show:
                found = recover(model, data, config, on_step=show)
        else:
            teacher, _, _ = open_any_model(config.teacher)
            objective = objective_for(None, config.teacher, tokenizer)
            with steps_progress("teaching", config.steps) as show:
                found = teach(model, teacher, data, config, objective, on_step=show)
        if config.save_dtype == "checkpoint":
            torch.nn.Module.to(model, dtype)
        write_model(model, out, folder)
        name = "recover.json" if config.teacher is None else "teach.json"
        write_json(out / name, {"config": dataclasses.asdict(config), **found.to_dict()})
    Console().print(_table(found) if isinstance(found, Recovery) else _taught(found))
    print(f"saved: {out}")
    return 0


def _table(found: Recovery) -> Table:
    after = "held-out nats/token"
    names = (after, *(f"capacity {c}" for c in MEASURED_AT), "changed tokens")
    table = make_table(*names, words=(after,))
    for stage in found.stages:
        losses = (stage.losses[name] for name in MEASURED_AT)
        cells = ("-" if loss is None else f"{loss:.4f}" for loss in losses)
        table.add_row(stage.name, *cells, f"{stage.changed_tokens:.1%}")
    return table


def _taught(found: Taught) -> Table:
    first, counted = "held-out nats/token", found.results["before"].counted
    table = make_table(first, "loss", *counted, words=(first,))
    for name, result in found.results.items():
        beside = (result.counted.get(key) for key in counted)
        cells = ("-" if value is None else f"{value:.3f}" for value in beside)
        table.add_row(name, f"{result.loss:.4f}", *cells)
    return table
