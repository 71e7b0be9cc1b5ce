"""`etr convert`: checkpoints of known model families to ours, and back."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from etr.cli._options import Source, Target, WithImports, parse
from etr.cli._progress import bytes_progress
from etr.cli._tables import make_table
from etr.cli._text import OnText, arguments_of
from etr.data import OpenedData, held_out_batches, open_data
from etr.evaluate import calibrate, evaluate
from etr.hf import EtrForCausalLM, convert, load_pretrained
from etr.hf.convert import Direction, TransformReport, write_model
from etr.hf.swap_router import SwapReport, set_temperatures, swap_router
from etr.moe import moe_layers
from etr.moe.config import parse_capacity
from etr.train.checkpoint_folder import find_model
from etr.train.folders import making

HELD_OUT_TOKENS = 4096
"""Most tokens of each domain by which the losses of `--router etr` are measured."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(OnText, WithImports):
    """Which folder to convert, and into what."""

    source: Source
    """Model folder with safetensors, of a known family or of this library."""
    target: Target
    """New folder."""
    router: Literal["keep", "etr"] = "keep"
    """keep: the same function as before. etr: orthonormal directions in the place of the learned
    ones, with temperatures and thresholds calibrated on text."""
    to: Direction | None = None
    """etr or hf; by default the one that the source is not."""
    capacity: str = "factor"
    """With router etr, the capacity that thresholds imitate, perhaps with options:
    factor:capacity_factor=0.6."""
    max_shard_bytes: int = 4 * 10**9
    """Size from which a new file of weights begins."""
    compare: bool = True
    """Run both models on a few tokens, print the largest difference of their logits, and refuse one
    that is more than rounding. Holds one whole model in memory, which converting alone does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router == "etr" and self.to == "hf":
            raise ValueError("router='etr' with to='hf': no family of transformers has that router")
        parse_capacity(self.capacity)


def run(arguments: list[str]) -> int:
    """Convert, and print what became of the function."""
    config = parse(ConvertConfig, "convert", arguments)
    target = Path(config.target)
    with making(target):
        return _into(target, find_model(config.source), config)


def _into(target: Path, source: Path, config: ConvertConfig) -> int:
    if config.router == "keep":
        _say(_convert(config, source, target))
        return 0
    if target.exists():
        raise ValueError(f"{config.target!r} exists already; name a new folder")
    kept = target.with_name(f"{target.name}.keep")
    if not (kept / "config.json").is_file():
        _convert(dataclasses.replace(config, to="etr"), source, kept)
    _swap(config, kept, target)
    shutil.rmtree(kept)
    return 0


def _convert(config: ConvertConfig, source: Path, target: Path) -> TransformReport:
    with bytes_progress("converting") as progress:
        return convert(
            source,
            target,
            to=config.to,
            max_shard_bytes=config.max_shard_bytes,
            progress=progress,
            compare=config.compare,
        )


def _say(report: TransformReport) -> None:
    if report.ignored:
        print(
            f"left out, as transformers does: {len(report.ignored)} tensors such as "
            f"{report.ignored[0]}"
        )
    print(
        f"saved: {report.target} ({report.family} as {report.to}, {report.num_tensors} tensors, "
        f"{report.num_bytes / 1e6:,.1f} MB)"
    )
    if report.difference is not None:
        print(report.difference)


def _swap(config: ConvertConfig, kept: Path, target: Path) -> None:
    data = open_data(config.data(str(kept)))
    model = load_pretrained(kept)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    model.to(device or "cpu")  # type: ignore[arg-type]
    losses = [("original router", _loss(model, data, config, "dropless"))]
    report = swap_router(
        model, map(arguments_of, config.batches(data, "fitting")), capacity=config.capacity,
        fit=False,
    )  # fmt: skip
    losses.append(("orthonormal router", _loss(model, data, config, "dropless")))
    set_temperatures(model, report)
    losses.append(("temperatures fitted", _loss(model, data, config, "dropless")))
    calibrate(model, config.batches(data, "calibrating"))
    losses.append((f"thresholds of {config.capacity}", _loss(model, data, config, "threshold")))
    write_model(model, target, kept)
    Console().print(_layers(model, report))
    Console().print(_losses(losses))
    print(
        f"{report.changed_tokens:.1%} of {report.num_tokens:,} tokens choose other experts than "
        f"before, on average over layers\nsaved: {target}"
    )


def _loss(model: EtrForCausalLM, data: OpenedData, config: ConvertConfig, selection: str) -> float:
    batches = held_out_batches(
        data.dataset,
        config.sequence_length,
        config.batch_size,
        HELD_OUT_TOKENS,
    )
    return evaluate(model, batches, data.dataset.domains, selection).loss


def _layers(model: EtrForCausalLM, report: SwapReport) -> Table:
    names = ("layer", "tokens changed", "choices changed", "temperature", "condition", "kept")
    table = make_table(*names)
    for number, (layer, found) in enumerate(zip(moe_layers(model), report.layers, strict=True)):
        share = layer.calibration.kept.sum() / layer.calibration.chosen.sum().clamp_min(1)
        table.add_row(
            str(number),
            f"{found.changed_tokens:.1%}",
            f"{found.changed_pairs:.1%}",
            f"{found.temperature:.2f}",
            f"{found.condition:.3g}",
            f"{float(share):.1%}",
        )
    return table


def _losses(losses: list[tuple[str, float]]) -> Table:
    table = make_table("after", "held-out nats/token", words=("after",))
    for name, loss in losses:
        table.add_row(name, f"{loss:.4f}")
    return table
