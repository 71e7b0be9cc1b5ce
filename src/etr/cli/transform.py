"""`etr transform`: what a method makes of a checkpoint, as a new folder of the same format."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from etr.cli._options import Source, Target, WithImports, parse
from etr.cli._progress import bytes_progress
from etr.cli._text import OnText, arguments_of, print_made
from etr.data import open_data
from etr.files import read_json, write_json
from etr.hf.transform import plan_of, transform
from etr.model.transform import TRANSFORMS, Transform
from etr.moe import RoutingContext
from etr.train.checkpoint_folder import find_model
from etr.train.folders import making


@dataclass(frozen=True, kw_only=True)
class TransformArguments(OnText, WithImports):
    """What to make of which folder."""

    name: Annotated[str, tyro.conf.Positional]
    """Transform, perhaps with options: heapr:ratio=0.5. `etr methods` lists them."""
    source: Source
    """Model folder with safetensors, of this library or of a known family."""
    target: Target
    """New folder; FILE.json for the plan alone, to read, change and give to --plan."""
    plan: str | None = None
    """JSON file with the plan: of etr plan for renumber, else transform.json of an earlier result,
    as it is or changed. By default the method plans, on text where it measures."""
    max_shard_bytes: int = 4 * 10**9
    """Size from which a new file of weights begins."""
    compare: bool = True
    """Run both models on a few tokens and print the largest difference of their logits; where the
    method promises the same function, refuse more than rounding. Holds one whole model in memory,
    which transforming alone does not."""

    def __post_init__(self) -> None:
        super().__post_init__()
        TRANSFORMS.parse(self.name)


def run(arguments: list[str]) -> int:
    """Transform, and print what became of the function."""
    config = parse(TransformArguments, "transform", arguments)
    method = TRANSFORMS.parse(config.name)
    plan, made_for = _given(config.plan)
    if config.target.endswith(".json"):
        source = find_model(config.source)
        record = plan_of(source, method, batches=_text(config, source, method))
        write_json(Path(config.target), record)
        print(
            f"written: {config.target}; carry it out: etr transform {config.name} "
            f"{config.source} NEW_FOLDER --plan {config.target}"
        )
        return 0
    with making(Path(config.target)):
        source = find_model(config.source)
        with bytes_progress("transforming") as progress:
            report = transform(
                source,
                config.target,
                method,
                plan=plan,
                made_for=made_for,
                batches=_text(config, source, method) if plan is None else (),
                max_shard_bytes=config.max_shard_bytes,
                progress=progress,
                compare=config.compare,
            )
    print_made(report, "the source")
    return 0


def _given(path: str | None) -> tuple[Any, dict[str, str] | None]:
    """A plan that was written before, and the checksums of what it was made for, if it says."""
    if path is None:
        return None, None
    found = read_json(Path(path))
    if isinstance(found, dict) and found.keys() >= {"transform", "plan"}:
        return found["plan"], found.get("made_for")
    return found, None


def _text(config: TransformArguments, source: Path, method: Transform) -> Iterator[dict[str, Any]]:
    """Batches as arguments of the model's forward; none for a method that does not measure."""
    if not method.measures:
        return
    for batch in config.batches(open_data(config.data(str(source))), "measuring"):
        given: dict[str, Any] = {**arguments_of(batch)}
        if "task" in method.needs:
            domain = batch.domain[:, None].expand_as(batch.input_ids)
            given["routing_context"] = RoutingContext(task=domain)
        yield given
