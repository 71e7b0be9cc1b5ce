"""What transforms make of models at several budgets: loss, bytes, operations and time.

python tools/transforms.py FOLDER ... [--calibrate TEXT ...]    measure each folder, write
python tools/transforms.py                                      write the page anew
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "docs/results/transforms.json", ROOT / "docs/results/transforms.md"
METHODS = (
    *(f"easy_ep:keep={share}" for share in (0.75, 0.5, 0.25)),
    *(f"heapr:ratio={share}" for share in (0.25, 0.5, 0.75)),
    *(f"heapr:ratio={share},score=activation" for share in (0.25, 0.5, 0.75)),
    *(f"heapr:ratio={share},score=random" for share in (0.25, 0.5, 0.75)),
    *(f"mc_smoe:keep={share}" for share in (0.75, 0.5, 0.25)),
    *(f"flexmore:rank={rank}" for rank in (32, 8, 2)),
    "compressed_experts:main=1",
    *(f"quantmoe:average={bits}" for bits in (3.5, 3, 2.5)),
    *(f"quantmoe:average={bits},score=random" for bits in (3.5, 3, 2.5)),
    *(f"edgemoe:tolerance={nats}" for nats in (0.01, 0.05, 0.2)),
    *(f"eaquant:bits={bits}" for bits in (8, 4, 2)),
    *(f"d2moe:use={levels}" for levels in (3, 2, 1)),
)
"""Each at three budgets where it has them, with its controls."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and on what text."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Model folders with a tokenizer."""
    calibrate: tuple[str, ...] = ("builtin",)
    """Text: its training part is measured on, its held-out part evaluated."""
    sequence_length: int = 256
    """Tokens of a row."""
    batch_size: int = 8
    """Rows of a batch."""
    num_batches: int = 16
    """Batches to measure on."""
    max_tokens_per_domain: int = 16384
    """Most held-out tokens of each domain."""
    cache_dir: str = "~/.cache/etr"
    """Folder for tokens."""


def measure(folder: str, settings: Settings, methods: tuple[str, ...] = METHODS) -> dict[str, Any]:
    """The source's loss, and of each method ratios to it and the difference by row of text."""
    from etr.cli._text import OnText, arguments_of
    from etr.data import held_out_batches, open_data
    from etr.hf.transform import transform
    from etr.model import TRANSFORMS

    names = ("calibrate", "sequence_length", "batch_size", "num_batches", "cache_dir")
    given = OnText(**{name: getattr(settings, name) for name in names})
    data = open_data(given.data(folder))
    sizes = (settings.sequence_length, settings.batch_size, settings.max_tokens_per_domain)
    held_out = list(held_out_batches(data.dataset, *sizes))
    text = [arguments_of(batch) for batch in given.batches(data, "reading")]
    loss, rows, seconds = _loss(folder, held_out, data.dataset.domains)
    found: dict[str, Any] = {"loss": loss, "methods": {}}
    for name in methods:
        with tempfile.TemporaryDirectory() as place:
            start = time.process_time()
            try:
                report = transform(folder, f"{place}/new", TRANSFORMS.parse(name), batches=text)
            except ValueError as error:
                found["methods"][name] = {"refused": str(error)}
                continue
            took = time.process_time() - start
            new, other, now = _loss(f"{place}/new", held_out, data.dataset.domains)
        assert report.flops is not None
        assert report.source_flops
        assert report.source_bytes
        more, error_of = _difference(other, rows)
        found["methods"][name] = {
            "loss": new,
            "difference": more,
            "error": error_of,
            "bytes": report.num_bytes / report.source_bytes,
            "flops": report.flops / report.source_flops,
            "time": now / seconds,
            "seconds": took,
        }
        print(f"{name}: {more:+.4f} nats, {found['methods'][name]['bytes']:.3f} of the bytes")
    return found


Rows = tuple[tuple[float, int], ...]


def _loss(folder: str, batches: list[Any], domains: tuple[str, ...]) -> tuple[float, Rows, float]:
    """Held-out loss of a folder, nothing dropped; of each row; and CPU seconds."""
    from etr.cli._model import open_any_model
    from etr.evaluate import evaluate

    model = open_any_model(folder)[0].eval()
    start = time.process_time()
    result = evaluate(model, batches, domains, "dropless")
    return result.loss, result.rows, time.process_time() - start


def _difference(new: Rows, old: Rows) -> tuple[float, float | None]:
    """Mean rise of the loss, nats a token, and its standard error over rows of text."""
    from etr.evaluate.held_out import ratio_error

    nats = torch.tensor([a - b for (a, _), (b, _) in zip(new, old, strict=True)]).double()
    tokens = torch.tensor([count for _, count in old])
    return float(nats.sum() / tokens.sum()), ratio_error(nats, tokens)


def page(found: dict[str, Any]) -> str:
    """The page of what was measured."""
    from etr.sheet import table

    head = ("method", "loss", "less the source's", "bytes", "expert FLOPs", "time", "to make, s")
    parts = [HEAD]
    for name, model in found.items():
        rows, refused = [], []
        for method, row in model["methods"].items():
            if "refused" in row:
                refused.append(f"- `{method}` is refused: {row['refused']}\n")
                continue
            error = "" if row["error"] is None else f" ± {row['error']:.4f}"
            ratios = (f"{row[key]:.3f}" for key in ("bytes", "flops", "time"))
            more = f"{row['difference']:+.4f}{error}"
            cells = (f"`{method}`", f"{row['loss']:.4f}", more, *ratios, f"{row['seconds']:.1f}")
            rows.append(cells)
        parts.append(f"## {name}\n\nThe source's held-out loss is {model['loss']:.4f} nats.\n\n")
        parts.append(table(head, rows, "lr"))
        parts += ["\n", *refused] if refused else []
    return "".join(parts)


HEAD = """<!-- generated by `python tools/transforms.py FOLDER ...`; do not edit, make it again -->

# Transforms: what they cost and save

Held-out loss as served without dropping, and its difference from the source's with one standard
error, paired over rows of text. Bytes, operations of the experts for a token and CPU time of the
evaluation are ratios to the source's. Bits are stored and unpacked again for each forward, so that
they save bytes and no time.

"""


def main(arguments: list[str]) -> None:
    from etr.files import read_json, write_json, write_text

    settings = tyro.cli(Settings, args=arguments)
    if settings.models:
        write_json(RECORD, {Path(one).name: measure(one, settings) for one in settings.models})
    write_text(PAGE, page(read_json(RECORD)))
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
