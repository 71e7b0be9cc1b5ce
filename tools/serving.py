"""What methods of serving do to one trained model: placement, memories and shared experts.

python tools/serving.py RUN [ETR TRACE OPTIONS]    train RUN if need be, measure, write
python tools/serving.py                            write the page anew from what was measured
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "docs/results/serving.json", ROOT / "docs/results/serving.md"
RANKS, NODES, BLOCK = 4, 2, 32
TRAIN = (
    "--router token_choice --capacity none --num-experts 16 --top-k 2 --num-layers 3 "
    "--hidden-size 64 --num-heads 4 --num-key-value-heads 4 --expert-size 64 --steps 400 "
    "--sequence-length 128 --batch-size 16 --device cpu"
)
"""Options of the model."""
PLANNERS = ("consecutive", "round_robin", "round_robin:by_load=true", "exflow", "moetuner")
CACHES = ("lru", "lfu", "expertflow", "oracle")
POLICIES = (
    "dropless",
    "dynamic_sharing:beta=0.5",
    "dynamic_sharing:beta=0.25",
    "dmoe:tau=0.9",
    "dmoe:tau=0.7",
)


def halves(trace: Any) -> list[tuple[Any, torch.Tensor]]:
    """What tokens asked for in every second sequence of a trace, and in the others; their ids."""
    from etr.systems import Demand

    choices, sequence = map(torch.tensor, trace.choices(kept=True))
    tokens = torch.tensor(trace.layer(0).token_id).long()
    found = []
    for parity in (0, 1):
        mine = sequence % 2 == parity
        demand = Demand.of(choices[:, mine], sequence[mine] // 2, trace.info.num_experts)
        found.append((demand, tokens[mine]))
    return found


def placements(seen: Any, held_out: Any) -> dict[str, list[float]]:
    """Hops that leave a rank and a node, and the busiest rank over the mean, on held-out text."""
    from etr.systems import PLANNERS as TABLE
    from etr.systems import Devices, travel

    devices, found = Devices(num_ranks=RANKS, num_nodes=NODES), {}
    for text in PLANNERS:
        moved = travel(held_out, TABLE.parse(text).plan(seen, devices))
        shares = [moved.hops_between_ranks / moved.hops, moved.hops_between_nodes / moved.hops]
        found[text] = [*shares, moved.max_over_mean]
    return found


def memories(seen: Any, held_out: Any) -> dict[str, dict[str, float]]:
    """Hit rate on held-out text by policy and experts held."""
    from etr.systems import CACHES as TABLE
    from etr.systems import replay

    (past, ids), (demand, tokens) = seen, held_out
    experts, found = demand.counts.shape[1], {}
    for name in CACHES:
        cache = TABLE.parse(name)
        expected = cache.learn(past, ids)(demand, tokens) if cache.predicts else None
        found[name] = {
            str(size): replay(
                demand.choices, cache, size, num_experts=experts, expected=expected
            ).hit_rate
            for size in (experts // 8, experts // 4, experts // 2)
        }
    return found


def used_in_blocks(choices: torch.Tensor) -> float:
    """Different experts of a block of tokens in a layer, on average."""
    blocks = choices.split(BLOCK, dim=1)
    counts = [len(layer[layer >= 0].unique()) for block in blocks for layer in block]
    return sum(counts) / len(counts)


def measure(arguments: list[str]) -> dict[str, Any]:
    """Everything about a run's newest checkpoint, on its held-out text."""
    from etr.cli._model import open_any_model
    from etr.cli._of_run import parse_with_text
    from etr.cli.trace import TraceConfig
    from etr.data import open_data
    from etr.evaluate.held_out import evaluate
    from etr.trace import read_trace
    from etr.trace.record import record_trace
    from etr.trace.sampling import SampledRows

    config = parse_with_text(TraceConfig, "trace", arguments, lambda c: (c.model,))
    model, _, folder = open_any_model(config.model)
    data = open_data(dataclasses.replace(config.data, tokenizer=str(folder)))
    rows = SampledRows(
        dataset=data.dataset,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        max_tokens=config.max_tokens,
    )
    domains, policies = data.dataset.domains, {}
    with tempfile.TemporaryDirectory() as place:
        for text in POLICIES:
            path = Path(place) / "trace.parquet"
            record_trace(model, rows, path, domains=domains, selection=text)
            trace = read_trace(path)
            if text == "dropless":
                (seen, ids), (held_out, tokens) = halves(trace)
                info = trace.info
            loss = evaluate(model, rows, domains, text).loss
            used = used_in_blocks(torch.tensor(trace.choices()[0]))
            policies[text] = [loss, used]
            print(f"{text}: loss {loss:.4f}, {used:.2f} experts in a block", flush=True)
    sizes = ("num_experts", "num_layers", "top_k", "router")
    return {
        "model": {name: getattr(info, name) for name in sizes},
        "tokens": len(ids) + len(tokens),
        "placement": placements(seen, held_out),
        "memory": memories((seen, ids), (held_out, tokens)),
        "policies": policies,
    }


def page(found: dict[str, Any]) -> str:
    """The page of what was measured."""
    from etr.sheet import table

    model, sizes = found["model"], list(found["memory"]["lru"])
    plain = found["policies"]["dropless"]
    placed = table(
        ("planner", "hops between ranks", "hops between nodes", "busiest rank"),
        (
            (f"`{name}`", f"{ranks:.1%}", f"{nodes:.1%}", f"{load:.2f} of mean")
            for name, (ranks, nodes, load) in found["placement"].items()
        ),
        "lr",
    )
    held = table(
        ("policy", *(f"{size} of {model['num_experts']} held" for size in sizes)),
        (
            (f"`{name}`", *(f"{row[size]:.1%}" for size in sizes))
            for name, row in found["memory"].items()
        ),
        "lr",
    )
    rows = (
        (name, f"{used:.2f}", f"{used / plain[1]:.2f}", f"{loss:.4f}", f"{loss - plain[0]:+.4f}")
        for name, (loss, used) in found["policies"].items()
    )
    head = ("policy", f"experts of a block of {BLOCK}", "share", "held-out loss", "less dropless")
    shared = table(head, ((f"`{name}`", *cells) for name, *cells in rows), "lr")
    return HEAD.format(train=TRAIN, **model, tokens=found["tokens"]) + BODY.format(
        placed=placed, held=held, shared=shared, ranks=RANKS, nodes=NODES
    )


HEAD = """<!-- generated by `python tools/serving.py RUN`; do not edit, make it again -->

# Serving: where experts are, which are in memory, and which a block uses

One small language model, `etr train {train}`:
{num_layers} layers of {num_experts} experts, top {top_k}; {tokens:,} tokens of its held-out text.
One seed of one model of this size: the tables show what the methods do to a real trace, and rank
none of them. Plans and predictions are made from every second sequence and measured on the others.

"""
BODY = """## Placement on {ranks} ranks and {nodes} nodes

Model outputs are equal whatever the placement. Hops go from each expert of a token to each of its
experts in the next layer ([place-experts.md](../guides/place-experts.md)).

{placed}
## A memory of a few experts

Share of uses that found their expert in memory, a memory for each layer, tokens one by one; the
text that is written is the same for every policy. `oracle` knows what comes and is a bound
([offload.md](../guides/offload.md)).

{held}
## Blocks that share their experts

These change what the model computes, so the loss stands beside. Text is read in one pass, in which
a block's tokens vote; while a model writes token by token, a request alone is served as without.

{shared}"""


def main() -> None:
    from etr.cli import main as cli
    from etr.files import read_json, write_json, write_text

    if len(sys.argv) > 1:
        if not Path(sys.argv[1]).exists() and cli(["train", "--out", sys.argv[1], *TRAIN.split()]):
            raise SystemExit("the model was not trained")
        write_json(RECORD, measure(sys.argv[1:]))
    write_text(PAGE, page(read_json(RECORD)))
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
