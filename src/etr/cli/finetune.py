"""`etr finetune --recover`: after a router swap, teach the new router the old one's choices."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.table import Table

from etr.cli._model import open_model
from etr.cli._of_run import parse_with_text
from etr.cli._options import WithImports
from etr.cli._progress import steps_progress
from etr.cli._tables import make_table
from etr.data import open_data
from etr.files import write_json
from etr.hf.convert import write_model
from etr.train.folders import making
from etr.train.model import SaveDtype
from etr.train.recover import MEASURED_AT, RecoverConfig, Recovery, recover


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RecoverConfig, WithImports):
    """Which model to fine-tune, and how."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder that `etr convert --router keep` wrote, or a run with router token_choice."""
    recover: bool = False
    """Swap the linear routers for ETR ones and teach them the old choices: the one kind of
    fine-tuning here. For text and conversations see `etr sft`, or any trainer of transformers."""
    out: str = "runs/recovered"
    """New folder for the model, with recover.json beside it."""
    save_dtype: SaveDtype = "float32"
    """float32: weights as trained, and as the losses were measured. checkpoint: rounded to the
    data type that they came in; thresholds stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.recover:
            raise ValueError("say --recover; for conversations use `etr sft`")


def run(arguments: list[str]) -> int:
    """Recover, save, and print the loss of each stage."""
    config = parse_with_text(FinetuneConfig, "finetune", arguments, lambda c: (c.model,))
    out = Path(config.out)
    with making(out):
        if out.exists():
            raise ValueError(f"out={config.out!r} exists already; name a new folder")
        return _recover(config, out)


def _recover(config: FinetuneConfig, out: Path) -> int:
    model, _, folder = open_model(config.model)
    dtype = model.dtype
    data = open_data(dataclasses.replace(config.data, tokenizer=str(folder)))
    with steps_progress("recovering", config.total_steps) as show:
        found = recover(model, data, config, on_step=show)
    if config.save_dtype == "checkpoint":
        torch.nn.Module.to(model, dtype)
    write_model(model, out, folder)
    write_json(out / "recover.json", {"config": dataclasses.asdict(config), **found.to_dict()})
    Console().print(_table(found))
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
