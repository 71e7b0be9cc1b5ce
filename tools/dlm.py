"""The page of the block-diffusion model of `make dlm`: what each method gains and costs.

python tools/dlm.py RUN PAGE [TOKENS]    TOKENS of held-out text for each domain
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCKS = 4
"""Blocks that are written after each prompt."""
SELECTIONS = ("dropless", "dmoe:tau=0.9", "dmoe:tau=0.7", "dynamic_sharing:beta=0.5")
UNMASKINGS = ("quota", "quota:threshold=0.9", "quota:steps=16", "bacd")
INTERVALS = (1, 2, 4, 8)
WORDS = """# A block-diffusion model, and what its experts cost

Made by `make dlm`: {steps:,} steps, {experts} experts, {top_k} a token, blocks of {block}. The loss
is an upper bound of the text's nats, over one draw of masks that is the same in every row.

## What can be ranked here, and what cannot

Policies that serve the same weights can: differences are paired over rows of text, and ± is their
standard error. Routers, schedules and ways to train cannot: that takes several seeds of each. How
many steps a block takes says how sure this model is, and a model of another size need not agree.

## Policies that let a block share experts

{selections}
## Which masks become tokens in a step

Of {prompts} prompts, {blocks} blocks each, the likeliest token in each place.

{unmaskings}
## Experts in memory, exchanged every few steps

Of a layer's {experts}, in steps of `quota`; tokens are the same in every row (TIDE).

{intervals}"""


def main() -> int:
    from etr.files import write_text

    run, page = sys.argv[1:3]
    write_text(Path(page), text_of(run, int(sys.argv[3]) if len(sys.argv) > 3 else 16384))
    print(f"written: {page}")
    return 0


def text_of(run: str, tokens: int, prompts: int = 4) -> str:
    """The page.

    Args:
        run: folder of the run.
        tokens: of held-out text, for each domain.
        prompts: rows of held-out text whose first half is gone on from.
    """
    from etr.cli._model import open_model
    from etr.cli._of_run import objective_for
    from etr.data import held_out_batches, open_data
    from etr.moe import moe_layers, set_eval_selection
    from etr.train.config import stored_config

    config = stored_config(Path(run))
    assert config is not None
    model, tokenizer, _ = open_model(run)
    objective: Any = objective_for(None, run, tokenizer)
    data = open_data(config.data)
    length = config.data.sequence_length
    batches = list(held_out_batches(data.dataset, length, config.data.batch_size, tokens))
    set_eval_selection(model, "dropless")
    rows = torch.cat([batch.input_ids for batch in batches])
    starts = rows[:: max(1, len(rows) // prompts)][:prompts, : length // 2]
    layer = moe_layers(model)[0].config
    return WORDS.format(
        steps=config.steps,
        experts=layer.num_experts,
        top_k=layer.top_k,
        block=objective.block,
        prompts=len(starts),
        blocks=BLOCKS,
        selections=selections(model, objective, batches, data.dataset.domains),
        unmaskings=unmaskings(model, objective, starts),
        intervals=intervals(model, objective, starts),
    )


def selections(model: Any, objective: Any, batches: list[Any], domains: tuple[str, ...]) -> str:
    """A table of the loss and of the experts that a block uses."""
    from etr.evaluate import evaluate
    from etr.evaluate.held_out import ratio_error
    from etr.sheet import table

    rows, first = [], torch.zeros(0)
    for name in SELECTIONS:
        with blocks_seen(model, objective.block) as used:
            found = evaluate(model, batches, domains, name, objective=objective)
        nats, count = torch.tensor(found.rows, dtype=torch.float64).unbind(1)
        first = nats if not rows else first
        more, error = float((nats - first).sum() / count.sum()), ratio_error(nats - first, count)
        rows.append(
            [
                f"`{name}`",
                f"{found.loss:.4f}",
                "" if not rows else f"{more:+.4f} ± {error or 0.0:.4f}",
                f"{found.asked_loss:.4f}",
                f"{sum(used) / len(used):.1f}",
            ]
        )
    head = ("selection", "bound, nats/token", "more", "nats/token to find", "experts of a block")
    return table(head, rows, "lr")


def unmaskings(model: Any, objective: Any, starts: Tensor) -> str:
    """A table of steps."""
    from etr.hf.fill import fill
    from etr.model import UNMASKINGS as KNOWN
    from etr.sheet import table

    rows = []
    for name in UNMASKINGS:
        steps: list[int] = []
        for start in starts:
            options = {"unmasking": KNOWN.parse(name), "on_step": steps.append}
            fill(model, objective, start[None], max_new_tokens=BLOCKS * objective.block, **options)
        rows.append([f"`{name}`", f"{len(steps) / steps.count(0):.2f}"])
    return table(("unmasking", "steps of a block"), rows, "lr")


def intervals(model: Any, objective: Any, starts: Tensor) -> str:
    """A table of moves and misses."""
    from etr.methods.tide import exchanged
    from etr.sheet import table
    from etr.systems import counts_of_passes
    from etr.trace import read_trace
    from etr.trace.steps import record_fill

    found: dict[tuple[int, int], list[int]] = {}
    for start in starts:
        with tempfile.TemporaryDirectory() as place:
            path, added = f"{place}/trace.parquet", BLOCKS * objective.block
            record_fill(model, objective, start[None], path=path, max_new_tokens=added)
            trace = read_trace(path)
        experts, choices = trace.info.num_experts, torch.tensor(trace.choices(kept=True)[0])
        counts, steps = counts_of_passes(choices, torch.tensor(trace.step), experts)
        for size in (experts // 4, experts // 2):
            for every in INTERVALS:
                total = found.setdefault((size, every), [0, 0, 0])
                for layer in counts:
                    one = exchanged(layer, steps, size, every)
                    for i, value in enumerate((one.moves, one.missed, int(layer.sum()))):
                        total[i] += value
    rows = [
        [str(size), str(every), f"{moves:,}", f"{missed / pairs:.3f}"]
        for (size, every), (moves, missed, pairs) in found.items()
    ]
    return table(("experts held", "steps between", "moves", "missed share of pairs"), rows, "r")


@contextmanager
def blocks_seen(model: Any, block: int) -> Iterator[list[int]]:
    """How many experts each block of each layer used, while it is open."""
    from etr.moe.watch import watch

    used: list[int] = []

    def see(place: int, view: Any) -> None:
        routing = view.routing
        table = routing.by_token(routing.expert.masked_fill(~view.selection.kept, -1))
        used.extend(len(set(one.flatten().tolist()) - {-1}) for one in table.split(block))

    with watch(model, see):
        yield used


if __name__ == "__main__":
    sys.exit(main())
