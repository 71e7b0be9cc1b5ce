"""A small Mixtral, its router swapped for ETR's and taught the old choices: the worked example.

Then on into the fixed frame, beside a copy that trains as long without.

python -m etr.recipes.recover --out runs/recover --page docs/results/convert.md
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from etr.data import DataConfig, open_data
from etr.files import write_json, write_text
from etr.hf import convert, load_pretrained
from etr.sheet import table
from etr.train import ModelConfig, OptimizerConfig, RoutingOptions, TrainConfig, train
from etr.train.checkpoint_folder import find_model, list_checkpoints
from etr.train.into_fixed import MOVING_SHARE
from etr.train.recover import MEASURED_AT, RecoverConfig, recover

STAGES = {
    "before": "the old, learned linear router",
    "swapped": "ETR router with the nearest orthonormal directions",
    "calibrated": "its temperatures fitted, thresholds calibrated",
    "recovered": "the old choices distilled into it, experts frozen",
    "trained": "the same directions, the whole model trained on",
    "fixed": "the fixed frame, the whole model trained on as long",
}


@dataclass(frozen=True, kw_only=True)
class RecoverRecipe:
    """The example, and where it goes."""

    out: str = "runs/recover"
    """Folder of the run, the converted models and recover.json."""
    page: str | None = None
    """Write the results here as Markdown, and as JSON beside it."""
    data: DataConfig = field(default_factory=lambda: DataConfig(sequence_length=256, batch_size=8))
    """Text of all stages."""
    train_steps: int = 400
    """Optimizer steps of the Mixtral."""
    learning_rate: float = 3e-3
    """Peak learning rate of the Mixtral, and of the steps into the fixed frame."""
    steps: int = 200
    """Steps of the distillation."""
    into_fixed: int = 200
    """Steps into the fixed frame, and of the copy that keeps its directions. 0: neither."""
    hidden_size: int = 128
    """Width of the Mixtral."""
    eval_tokens_per_domain: int = 8192
    """Held-out tokens of each domain behind every loss."""


def tiny_mixtral(recipe: RecoverRecipe) -> TrainConfig:
    """A Mixtral in all but size: linear router, top-2, normalised weights, nothing dropped."""
    return TrainConfig(
        out=str(Path(recipe.out) / "train"),
        data=recipe.data,
        model=ModelConfig(
            hidden_size=recipe.hidden_size,
            num_layers=3,
            routing=RoutingOptions(
                router="token_choice",
                capacity="none",
                top_k=2,
                expert_size=recipe.hidden_size,
                normalize="chosen",
            ),
        ),
        optimizer=OptimizerConfig(learning_rate=recipe.learning_rate),
        steps=recipe.train_steps,
        eval_every=recipe.train_steps,
        eval_tokens_per_domain=recipe.eval_tokens_per_domain,
        checkpoint_every=recipe.train_steps,
        keep_checkpoints=1,
        diagnostics=False,
        profile_every=None,
    )


def run(recipe: RecoverRecipe) -> dict[str, Any]:
    """Train, convert to a transformers Mixtral and back, swap, recover; stages that are there stay.

    Returns:
        What recover.json holds.
    """
    out = Path(recipe.out)
    if not list_checkpoints(out / "train"):
        train(tiny_mixtral(recipe))
    for source, target in ((out / "train", out / "mixtral"), (out / "mixtral", out / "keep")):
        if not target.exists():
            convert(find_model(source), target)
    model = load_pretrained(out / "keep")
    data = dataclasses.replace(recipe.data, tokenizer=str(out / "keep"))
    config = RecoverConfig(
        data=data,
        steps=recipe.steps,
        into_fixed=recipe.into_fixed,
        into_fixed_learning_rate=recipe.learning_rate,
        eval_tokens_per_domain=recipe.eval_tokens_per_domain,
    )
    found = recover(model, open_data(data), config)
    result = {"format": 1, "recipe": dataclasses.asdict(recipe), **found.to_dict()}
    result["recipe"]["data"].pop("cache_dir")
    for name in ("out", "page"):  # where it lies is not part of the result
        result["recipe"].pop(name)
    write_json(out / "recover.json", result)
    return result


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    recipe = result["recipe"]
    head = ("stage", "router", *MEASURED_AT, "choose other experts")
    rows = [
        (
            *(stage["name"], STAGES[stage["name"]]),
            *(_cell(stage["losses"][name]) for name in MEASURED_AT),
            f"{stage['changed_tokens']:.1%}",
        )
        for stage in result["stages"]
    ]
    first, last = result["distillation"][0], result["distillation"][-1]
    return "\n".join(
        [
            "# A router swapped, and its choices recovered",
            "",
            "Written by `python -m etr.recipes.recover --page docs/results/convert.md` from "
            "[convert.json](convert.json); one seed, so differences of a hundredth mean nothing.",
            "",
            f"A Mixtral of 3 layers, width {recipe['hidden_size']}, 8 experts, top-2, trained "
            f"dropless for {recipe['train_steps']} steps on the built-in text, converted to "
            "transformers' own class and back. Then its routers were swapped for ETR's "
            f"(`orthonormal` frame) and taught the old choices for {recipe['steps']} steps, "
            "experts frozen. Held-out nats per token, nothing dropped (capacity none) or by "
            "thresholds calibrated to a capacity factor:",
            "",
            table(head, rows),
            "The last column is the share of (token, layer) pairs whose set of experts is not the "
            "one that the old router chooses from the same hidden state. The divergence of the new "
            f"gates from the old ones went from {first:.4f} to {last:.4f} nats. An orthonormal "
            "router cannot copy every linear one: where the old rows are far from orthogonal, some "
            "choices stay different.",
            "",
            *_into_fixed(result),
        ]
    )


CHOSEN = " (at a third of it both rows lose, the fixed one more; chosen by these losses)"
"""How the default rate came about."""


def _into_fixed(result: dict[str, Any]) -> list[str]:
    """What became of the fixed frame, as lines of Markdown; none where it was not asked for."""
    losses = {stage["name"]: stage["losses"] for stage in result["stages"]}
    if "fixed" not in losses:
        return []
    recipe = result["recipe"]
    chosen = CHOSEN if recipe["learning_rate"] == RecoverRecipe.learning_rate else ""
    more = (f"{losses['fixed'][name] - losses['trained'][name]:+.4f}" for name in MEASURED_AT)
    return [
        "## Into the fixed frame",
        "",
        "The experts of each layer were numbered anew, so that learned directions are near the "
        "blocks, which changes nothing of what the model computes. Then two copies of *recovered* "
        f"were trained for {recipe['into_fixed']} steps on the same batches: all weights but the "
        "directions, language-model and balance loss, capacity factor 1.1, peak learning rate "
        f"{recipe['learning_rate']:g} as for the Mixtral{chosen}. In *trained* the directions "
        "stayed. In "
        "*fixed* they turned to the paper's fixed blocks over the first "
        f"{MOVING_SHARE:.0%} of the steps; its routers then have no weight but a temperature.",
        "",
        "What more training gains by itself is the difference of *recovered* and *trained*. The "
        f"loss of *fixed* less that of *trained*, at capacities {', '.join(MEASURED_AT)}: "
        f"{', '.join(more)}. In both rows the last column compares with the old router's weights "
        "on hidden states that have changed since.",
        "",
    ]


def _cell(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def main() -> None:
    """Run the example from the command line."""
    recipe = tyro.cli(RecoverRecipe, config=(tyro.conf.OmitArgPrefixes,))
    result = run(recipe)
    if recipe.page is not None:
        path = Path(recipe.page)
        write_text(path, page(result))
        write_text(path.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    print(page(result))


if __name__ == "__main__":
    main()
