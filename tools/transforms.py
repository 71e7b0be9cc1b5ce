"""What transforms make of models at several budgets: loss, bytes, operations and time.

python tools/transforms.py MODEL ... [OPTIONS]    make what is not made, measure what is not
                                                  measured, write the page after each method
python tools/transforms.py                        write the page anew

A MODEL is a name of `MODELS` or a folder. What was stopped goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transform_models as made
import tyro
from transform_controls import CONTROLS, KINDS, Scores, drawn, magnitudes
from transform_models import Subject

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "docs/results/transforms.json", ROOT / "docs/results/transforms.md"
MODELS = {
    "demo": Subject(
        about="The baseline of `etr demo`, trained as long: 8 experts, of which a token takes 1.",
        make=made.demo,
        methods=(*made.SHRINK, *made.GROW),
    ),
    "qwen3_moe": Subject(
        about="A Qwen3-MoE of transformers, trained there from scratch on the same text for as "
        "many steps: 16 experts, of which a token takes 4.",
        make=made.qwen3_moe,
        methods=(*made.SHRINK, *made.GROW),
    ),
    "smollm2": Subject(
        about="SmolLM2-135M-Instruct copied into 4 experts, of which a token takes 2, and tuned on "
        "functions of the standard library; the text is other functions. Without `edgemoe`, which "
        "runs the text twice for each expert.",
        make=made.smollm2,
        folder="token_choice-sft",
        methods=made.LARGE,
        text="other-functions.jsonl",
    ),
    "dense": Subject(
        about="A dense Llama, trained on the same text as the first two.",
        make=made.dense,
        methods=made.FROM_DENSE,
    ),
    "versions": Subject(
        about="The dense Llama above and eight versions whose feed-forwards were tuned on "
        f"{', '.join(made.TUNED_ON)}, as experts of one model. Losses, FLOPs and time are "
        "compared with the dense one's, bytes with those of all nine.",
        make=made.versions,
        methods=made.FROM_VERSIONS,
        base="dense",
    ),
}
"""Models that are made where they are not there."""
Rows = Sequence[tuple[float, int]]
"""Summed nats and tokens of each row of text."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and on what text."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Names of models, or folders with a tokenizer."""
    out: str = "runs/transforms"
    """Folder for the models that are made."""
    methods: tuple[str, ...] = ()
    """These alone, with or without options; all of the model where none is given."""
    calibrate: tuple[str, ...] = ("builtin",)
    """Text of a folder: its training part is measured on, its held-out part evaluated."""
    sequence_length: int = 256
    """Tokens of a row."""
    batch_size: int = 8
    """Rows of a batch."""
    num_batches: int = 4
    """Batches to measure on."""
    max_tokens_per_domain: int = 4096
    """Most held-out tokens of each domain."""
    draws: int = 3
    """Random controls of each method and budget."""
    rounds: int = 5
    """Times that a batch is timed."""
    cache_dir: str = "~/.cache/etr"
    """Folder for tokens."""


SAME = ("sequence_length", "batch_size", "num_batches", "max_tokens_per_domain", "draws", "rounds")
"""Settings that results depend on: with others a model is measured anew."""


class Model:
    """A model of the page: its folder, its text, and what it loses on each held-out row."""

    def __init__(self, name: str, settings: Settings) -> None:
        from etr.cli._text import OnText
        from etr.data import held_out_batches, open_data
        from etr.hf.source import checksums
        from etr.train.checkpoint_folder import find_model

        subject, place, text = MODELS.get(name), Path(name), settings.calibrate
        base = folder = place
        if subject:
            place = Path(settings.out, name)
            folder, base = place / subject.folder, place.with_name(subject.base or name)
            if not done(folder):
                subject.make(place)
            text = text if subject.text == "builtin" else (str(place / subject.text),)
        self.folder = find_model(folder)
        names = ("sequence_length", "batch_size", "num_batches", "cache_dir")
        given = OnText(calibrate=text, **{one: getattr(settings, one) for one in names})
        data = open_data(given.data(str(self.folder)))
        sizes = (settings.sequence_length, settings.batch_size, settings.max_tokens_per_domain)
        self.domains = data.dataset.domains
        self.held_out = list(held_out_batches(data.dataset, *sizes))
        self.text = list(given.batches(data, "reading"))
        self.source = opened(base if base != place else self.folder)
        self.rows = self.loss(self.source)
        self.magnitudes: list[Scores] = magnitudes(self.folder)
        said = dataclasses.asdict(settings)
        self.key = {
            "settings": {one: said[one] for one in SAME},
            "weights": checksums(self.folder),
            "rows": len(self.rows),
            "loss": mean(self.rows),
        }

    def loss(self, model: Any) -> Rows:
        """Held-out nats of each row, nothing dropped."""
        from etr.evaluate import evaluate

        return evaluate(model, self.held_out, self.domains, "dropless").rows

    def time(self, model: Any, rounds: int) -> float:
        """CPU time of a batch over the source's: the fastest of a few, in turns."""
        from etr.evaluate import evaluate

        both: tuple[list[float], list[float]] = [], []
        for _ in range(rounds):
            for one, found in zip((model, self.source), both, strict=True):
                start = time.process_time()
                evaluate(one, self.held_out[:1], self.domains, "dropless")
                found.append(time.process_time() - start)
        return min(both[0]) / min(both[1])


def done(folder: Path) -> bool:
    """Whether a model is there: a folder of one, or a run with a checkpoint."""
    from etr.train.checkpoint_folder import list_checkpoints

    return (folder / "config.json").is_file() or bool(list_checkpoints(folder))


def opened(folder: Path) -> Any:
    """A model of any format with the layers of this library, so that times compare."""
    from etr.hf import load_pretrained
    from etr.hf.source import Source

    source = Source.open(folder)
    ours = source.reader.config["model_type"] == "etr"
    return (load_pretrained(folder) if ours else source.load()).eval()


def measure(model: Model, name: str, settings: Settings) -> dict[str, Any]:
    """Of one method: ratios to the source, and differences by row, also from its controls.

    What the method refuses is its result.
    """
    from etr.hf.transform import flops_of_a_token, plan_of, transform
    from etr.model import TRANSFORMS

    method = TRANSFORMS.parse(name)
    text = [arguments_of(batch) for batch in model.text]
    start = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        try:
            plan = plan_of(model.folder, method, batches=text)["plan"]
            report = transform(model.folder, f"{place}/new", method, plan=plan)
        except ValueError as error:
            return {"refused": str(error)}
        seconds = time.process_time() - start
        new = opened(Path(place, "new"))
        rows, ratio = model.loss(new), model.time(new, settings.rounds)
    assert report.flops is not None
    assert report.source_bytes
    return {
        **difference(rows, model.rows),
        "bytes": report.num_bytes / report.source_bytes,
        "flops": report.flops / flops_of_a_token(model.source),
        "time": ratio,
        "seconds": seconds,
        "serves": report.to,
        "controls": {} if "," in name else controls(model, method, plan, rows, settings.draws),
    }


def arguments_of(batch: Any) -> dict[str, Any]:
    """A batch as arguments of a model's forward, with the domain of each token."""
    from etr.moe import RoutingContext

    domain = batch.domain[:, None].expand_as(batch.input_ids)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.valid_mask.long(),
        "routing_context": RoutingContext(task=domain),
    }


def controls(model: Model, method: Any, plan: Any, rows: Rows, draws: int) -> dict[str, Any]:
    """What plans of the same sizes lose, by chance (the mean of some) and by size of weights."""
    from etr.hf.transform import transform

    change, kinds = CONTROLS.get(method.name, (None, ()))
    found = {}
    for kind in kinds:
        assert change is not None
        scores = [model.magnitudes]
        if kind == "random":
            scores = [drawn(model.magnitudes, seed) for seed in range(draws)]
        several: list[Rows] = []
        for one in scores:
            with tempfile.TemporaryDirectory() as place:
                transform(model.folder, f"{place}/new", method, plan=change(plan, one))
                several.append(model.loss(opened(Path(place, "new"))))
        each = zip(*several, strict=True)
        other = [(sum(nats for nats, _ in row) / len(row), row[0][1]) for row in each]
        found[kind] = {**difference(other, model.rows), "method_less": difference(rows, other)}
    return found


def difference(new: Rows, old: Rows) -> dict[str, Any]:
    """Mean rise of the loss, nats a token, and its standard error over rows of text."""
    from etr.evaluate.held_out import ratio_error

    nats = torch.tensor([a - b for (a, _), (b, _) in zip(new, old, strict=True)]).double()
    tokens = torch.tensor([count for _, count in old])
    return {"difference": float(nats.sum() / tokens.sum()), "error": ratio_error(nats, tokens)}


def mean(rows: Rows) -> float:
    """Nats a token."""
    return sum(nats for nats, _ in rows) / sum(count for _, count in rows)


def run(settings: Settings) -> None:
    """Measure what is not measured yet, and write record and page after each method."""
    from transformers.utils.logging import disable_progress_bar

    from etr.files import read_json, write_json, write_text

    disable_progress_bar()
    found = read_json(RECORD) if RECORD.is_file() else {}
    for name in settings.models:
        try:
            model = Model(name, settings)
        except made.MissingError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue
        known = found.get(Path(name).name, {})
        if {key: known.get(key) for key in model.key} != model.key:
            known = {**model.key, "methods": {}}
        found[Path(name).name] = known
        subject = MODELS.get(name)
        methods = settings.methods or (subject.methods if subject else made.SHRINK)
        for number, method in enumerate(methods, 1):
            if method not in known["methods"]:
                row = known["methods"][method] = measure(model, method, settings)
                said = row["refused"] if "refused" in row else f"{row['difference']:+.4f} nats"
                print(f"{name} {number}/{len(methods)} {method}: {said}", flush=True)
                write_json(RECORD, found)
                write_text(PAGE, page(found))
    write_text(PAGE, page(found))
    print(f"written: {PAGE}")


def page(found: dict[str, Any]) -> str:
    """The page of what was measured."""
    absent = [f"- {name}: {one.about}\n" for name, one in MODELS.items() if name not in found]
    parts = [HEAD, _against_chance(found), *(_of_model(*each) for each in found.items())]
    return "".join([*parts, "\n## Not measured\n\n" if absent else "", *absent])


COLUMNS = (
    "method",
    "loss rises by",
    "by chance",
    "by size",
    "bytes",
    "expert FLOPs",
    "time",
    "in",
    "to make, s",
)


def _of_model(name: str, model: dict[str, Any]) -> str:
    from etr.sheet import table

    subject, sizes = MODELS.get(name), model["settings"]
    rows, reasons = [], dict[str, list[str]]()
    for method, row in model["methods"].items():
        if "refused" in row:
            reasons.setdefault(row["refused"], []).append(f"`{method}`")
            continue
        ratios = (f"{row[key]:.3f}" for key in ("bytes", "flops", "time"))
        chance = (_nats(row["controls"][k]) if k in row["controls"] else "" for k in KINDS)
        format_ = "theirs" if row["serves"] == "hf" else "ours"
        cells = (f"`{method}`", _nats(row), *chance, *ratios, format_, f"{row['seconds']:.1f}")
        rows.append(cells)
    about = f"{subject.about} " if subject else ""
    missing = [one for one in subject.methods if one not in model["methods"]] if subject else []
    text = (
        f"\n## {name}\n\n{about}Its held-out loss is {model['loss']:.4f} nats over {model['rows']} "
        f"rows of {sizes['sequence_length']} tokens; methods that measure saw "
        f"{sizes['num_batches']} batches of {sizes['batch_size']}.\n\n"
    )
    if missing:
        text += f"Not measured yet: {', '.join(f'`{one}`' for one in missing)}.\n\n"
    refused = [
        f"- {', '.join(each)} {'is' if len(each) == 1 else 'are'} refused: {reason}\n"
        for reason, each in reasons.items()
    ]
    return text + table(COLUMNS, rows, "lr") + "".join(["\n", *refused] if refused else [])


def _nats(row: dict[str, Any]) -> str:
    error = "" if row["error"] is None else f" ± {row['error']:.4f}"
    return f"{row['difference']:+.4f}{error}"


def _against_chance(found: dict[str, Any]) -> str:
    """The loss of each method less that by chance, by model and budget, and which lose clearly."""
    from etr.sheet import table

    cells: dict[str, dict[str, list[str]]] = {}
    worse = []
    for name, model in found.items():
        for method, row in model["methods"].items():
            if "random" not in row.get("controls", {}):
                continue
            less = row["controls"]["random"]["method_less"]
            clear = less["error"] is not None and abs(less["difference"]) > 2 * less["error"]
            text = f"{less['difference']:+.3f}"
            of_method = cells.setdefault(method.partition(":")[0], {})
            of_method.setdefault(name, []).append(f"**{text}**" if clear else text)
            if clear and less["difference"] > 0:
                worse.append(f"`{method}` on {name} ({_nats(less)})")
    names = [name for name in found if any(name in each for each in cells.values())]
    rows = [
        (f"`{method}`", *(", ".join(each.get(name, [])) for name in names))
        for method, each in cells.items()
    ]
    losers = f"- Clearly worse than chance: {', '.join(worse) or 'none'}.\n"
    return table(("method", *names), rows, "l") + "\n" + losers + _without_idea(found)


WITHOUT = {",score=activation": "by activation norms", ",align=false": "not aligned"}
WITHOUT |= {",smooth=false": "without smoothing"}
"""Ends of rows that go without a method's idea."""


def _without_idea(found: dict[str, Any]) -> str:
    """Rows that lose no less than what goes without the idea of their method."""
    lines = []
    for name, model in found.items():
        for method, row in model["methods"].items():
            for end, words in WITHOUT.items():
                other = model["methods"].get(method + end, {})
                if "difference" not in other or "difference" not in row:
                    continue
                if row["difference"] >= other["difference"]:
                    both = f"{row['difference']:+.4f}, {words} {other['difference']:+.4f}"
                    lines.append(f"`{method}` on {name} ({both})")
    return f"- Not better than what goes without the idea: {', '.join(lines) or 'none'}.\n"


HEAD = """<!-- generated by `make transforms`; do not edit, make it again -->

# Transforms: what they cost and save

Held-out loss as served without dropping, less the source's, in nats a token, with one standard
error, paired over rows of text. Nothing is trained after a transform: what grows a model, or
compresses choices into vectors, is a start for training, and its row says what the start costs.

- Bytes of the folder, operations of the experts for a token (of one that takes the widest, where
  widths differ) and CPU time are ratios to the source's.
- Time is that of one batch in evaluation, the fastest of a few, in turns with the source, on a busy
  machine: a few hundredths say nothing. Bits are stored, and unpacked again for each forward, which
  takes time; experts of unequal widths (`heapr`) run one after another.
- "In" is the format that holds the result: the source's family of transformers (theirs), or this
  library's (ours).
- One seed of each model. The error is over rows of text, not over draws, seeds or models.

## Against chance

Of methods that choose, controls keep as much by chance (the mean of a few draws) and by the size
of weights. What has nothing to choose in its budget has none: `flexmore`, `compressed_experts`,
`d2moe`, `eaquant`. Rows without smoothing, without alignment, by activation norms and with equal
bits are what `eaquant`, `mc_smoe`, `heapr` and `quantmoe` have to beat. `super_experts` prunes
nothing: its rows silence the expert that stands out most, and another one.

Loss of the method less that of its random control, paired, in the order of budgets below: where it
is negative, choosing helps. Bold is clear: more than two standard errors.

"""


def main(arguments: list[str]) -> None:
    run(tyro.cli(Settings, args=arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
