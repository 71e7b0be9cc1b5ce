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
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))  # which one who imports this file need not see
import serving_times as times  # noqa: E402
from serving_page import page  # noqa: E402

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
AHEAD = ("edgemoe",)
"""Policies that the bound is not one of: they bring experts in before they are asked for."""
RUN_BY = ("lru", "lfu")
"""Policies that a model can run with: they go by nothing that is not there while it writes."""
DECODINGS = ("plain", "scmoe:beta=0.3", "scmoe:beta=1", "rewire:rate=0.1", "rewire:rate=0.3")
ROUNDS = 20
"""Of timings on ranks."""
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


def on_ranks(
    folder: Path, seen: Any, held_out: Any, ids: torch.Tensor, row_bytes: int, rounds: int = ROUNDS
) -> dict[str, Any]:
    """What models that are renumbered by plans take on an emulated cluster, or why there is none.

    Args:
        folder: the model.
        ids: text, int64 [R, S], R a multiple of the ranks.
        row_bytes: of a token that travels.
    """
    from etr.cluster import EmulatedCluster, emulate, why_unavailable
    from etr.files import read_json, write_json
    from etr.hf.transform import transform
    from etr.model.transform import Renumber
    from etr.systems import PLANNERS as TABLE
    from etr.systems import Devices, travel

    if (reason := why_unavailable()) is not None:
        return {"missing": reason}
    devices, flows, models = Devices(num_ranks=RANKS, num_nodes=NODES), {}, {}
    with tempfile.TemporaryDirectory() as place:
        for number, text in enumerate(PLANNERS):
            plan = TABLE.parse(text).plan(seen, devices)
            flows[text] = travel(held_out, plan).flow.tolist()
            models[text] = f"{place}/{number}"
            transform(folder, models[text], Renumber(), plan=plan.to_dict())
        save_file({"ids": ids.contiguous()}, f"{place}/ids.safetensors")
        job = {"models": models, "flows": flows, "row_bytes": row_bytes, "rounds": rounds}
        job |= {"ids": f"{place}/ids.safetensors", "out": f"{place}/out.json"}
        write_json(Path(place) / "job.json", job)
        program = str(ROOT / "tools/serving_ranks.py")
        cluster = EmulatedCluster(nodes=NODES, ranks_per_node=RANKS // NODES)
        if emulate(cluster, [sys.executable, program, f"{place}/job.json"]):
            raise SystemExit("the ranks failed")
        return {"inter": cluster.inter, "intra": cluster.intra} | read_json(Path(job["out"]))


def replayed(name: str, seen: Any, held_out: Any) -> dict[str, Any]:
    """What a memory by a policy did on held-out text, by experts held."""
    from etr.systems import CACHES as TABLE
    from etr.systems import replay

    (past, ids), (demand, tokens) = seen, held_out
    experts, cache = demand.counts.shape[1], TABLE.parse(name)
    expected = cache.learn(past, ids)(demand, tokens) if cache.predicts else None
    options = {"num_experts": experts, "expected": expected}
    sizes = (experts // 8, experts // 4, experts // 2)
    return {str(size): replay(demand.choices, cache, size, **options) for size in sizes}


def memories(seen: Any, held_out: Any) -> dict[str, dict[str, float]]:
    """Hit rate by policy and experts held, of those that load misses alone."""
    return {
        name: {size: done.hit_rate for size, done in replayed(name, seen, held_out).items()}
        for name in CACHES
    }


def ahead(seen: Any, held_out: Any) -> dict[str, dict[str, list[float]]]:
    """Hit rate, and loads over uses, of those that bring experts in beforehand."""
    return {
        name: {
            size: [done.hit_rate, done.loads / done.uses]
            for size, done in replayed(name, seen, held_out).items()
        }
        for name in AHEAD
    }


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
    from etr.moe import moe_layers
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
    text = torch.cat([batch.input_ids for batch in rows])
    names = ("num_experts", "num_layers", "top_k", "router")
    experts, size = info.num_experts, moe_layers(model)[0].config.hidden_size
    return {
        "settings": {"train": TRAIN, "ranks": RANKS, "nodes": NODES, "block": BLOCK},
        "rounds": times.ROUNDS,
        "model": {name: getattr(info, name) for name in names},
        "tokens": len(ids) + len(tokens),
        "expert_bytes": int(moe_layers(model)[0].bank.sizes[0]) * 4,
        "placement": placements(seen, held_out),
        "ranks": on_ranks(folder, seen, held_out, text[1::2][: RANKS * 8], 4 * size),
        "memory": memories((seen, ids), (held_out, tokens)),
        "ahead": ahead((seen, ids), (held_out, tokens)),
        "offload": times.of_memories(folder, RUN_BY, experts // 4, text[:1]),
        "policies": policies,
        "times": times.of_policies(model, POLICIES, text[:16]),
        "decodings": times.of_decodings(model, DECODINGS, text),
    }


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
