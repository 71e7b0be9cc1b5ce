"""Invented comparisons for the tests of etr.report: shaped like real ones, seeded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from invented_rows import alarm, diagnostics, layer_extras, profile, write_trace

Variant = tuple[str, str, str, str, float, float, bool]
VARIANTS: tuple[Variant, ...] = (
    ("baseline 1.1", "baseline", "factor 1.1", "dropless", 1.60, 1.00, True),
    ("linear 1.1", "linear", "factor 1.1", "threshold", 1.585, 1.00, True),
    ("etr schedule", "etr", "schedule 1.1 to 0.6", "threshold", 1.60, 0.72, True),
    ("etr mass 0.7", "etr", "affinity_mass 0.7", "threshold", 1.63, 0.60, True),
    ("expert choice", "expert_choice", "factor 1.0", "threshold", 1.52, 1.00, False),
)
DOMAINS = ("python", "c++ headers", "docstrings", "mathematics")


def make_results(
    folder: Path,
    *,
    seeds: int = 3,
    steps: int = 400,
    variants: int = len(VARIANTS),
    layers: int = 3,
    experts: int = 8,
    kinds: Sequence[Variant] = VARIANTS,
) -> dict[str, Any]:
    """Write results.json and every run's metrics.jsonl into `folder`; return the results."""
    rows = []
    for index, variant in enumerate(kinds[:variants]):
        for seed in range(seeds):
            random = np.random.default_rng(100 * index + seed)
            name = f"runs/{index}-{seed}/metrics.jsonl"
            lines = _lines(variant, steps, layers, experts, random)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
            if seed == 0:
                write_trace((folder / name).parent, layers=layers, experts=experts)
            rows.append(_row(variant, seed, steps, name, random))
    results = {
        "format": 1,
        "command": "etr compare --recipe demo --seeds 0 1 2 --output runs/demo",
        "config": {"model": {"hidden_size": 128, "layers": layers}, "train": {"steps": steps}},
        "environment": {
            "etr": "0.1.0, commit 0123456789ab",
            "corpus": "89abcdef01234567",
            "python": "3.11.9",
            "torch": "2.13.0",
            "threads": 2,
            "machine": "x86_64, 2 cores",
            "date": "2026-11-20",
        },
        "rows": rows,
    }
    write_results(folder, results)
    return results


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(results))
    return path


def _kept(variant: Variant, u: float) -> float:
    return 0.97 - 0.97 * (1 - float(variant[5])) * min(u / 0.7, 1)


def _lines(
    variant: Variant, steps: int, layers: int, experts: int, random: np.random.Generator
) -> list[dict[str, Any]]:
    scored = variant[1] != "baseline"
    other = np.random.default_rng(steps)  # of its own, for the losses to stay what tests know
    lines: list[dict[str, Any]] = [diagnostics(0, layers, experts, scored, other)]
    flops = 0.0
    skew = random.dirichlet(np.full(experts, 2.0), size=layers)
    for step in range(1, steps + 1):
        u = step / steps
        kept = min(_kept(variant, u) + 0.01 * random.standard_normal(), 1.0)
        flops += 6e9 * kept
        loss = variant[4] + 4 * float(np.exp(-step / 40)) + 0.5 * float(np.exp(-3 * u))
        shares = (1 - u) * skew + u / experts
        choices = [random.multinomial(4096, share) for share in shares]
        lines.append(
            {
                "kind": "train",
                "step": step,
                "tokens": 4096 * step,
                "expert_flops": flops,
                "elapsed_seconds": 0.08 * step,
                "step_time_seconds": 0.08,
                "tokens_per_second": 51200.0,
                "loss": loss + 0.05 * random.standard_normal(),
                "losses": {"aux": 0.01, "z": 0.0, "locality": 0.0},
                "router_loss_aux": 0.01,
                "grad_norm": 1.0,
                "learning_rate": 1e-3,
                "kept_fraction": kept,
                "drop_rate": 1 - kept,
                "tokens_without_expert": 1 - kept,
                "capacity_mean": 512.0,
                "capacity_factor": None
                if variant[1] == "expert_choice"
                else round(1.13 * _kept(variant, u), 2),
                "memory_bytes": 2**20 * (300 + step // 10),
                "bytes_within_node": 2**20 * kept,
                "bytes_between_nodes": 2**19 * kept,
                "max_violation": float(max(c.max() for c in choices)) * experts / 4096 - 1,
                "layers": [
                    {
                        "num_tokens_per_expert": c.tolist(),
                        "num_choices_per_expert": c.tolist(),
                        **layer_extras(c.tolist(), kept, scored),
                    }
                    for c in choices
                ],
                "a_key_of_tomorrow": {"x": 1},
            }
        )
        if step == 1 or step % max(steps // 8, 1) == 0:
            lines.extend(
                {
                    "kind": "eval",
                    "step": step,
                    "tokens": 4096 * step,
                    "expert_flops": flops,
                    "selection": selection,
                    "val_loss": loss + 0.08 + 0.006 * float(np.sin(step + 50 * skew[0, 0])),
                    "val_loss_by_domain": {},
                    "kept_fraction_eval": kept,
                }
                for selection in ("threshold", "dropless")
            )
            lines.append(diagnostics(step, layers, experts, scored, other))
    if variant[0] == "etr schedule":
        lines.append(alarm(steps))
    return [*lines, profile(steps)]


def _row(
    variant: Variant, seed: int, steps: int, metrics: str, random: np.random.Generator
) -> dict[str, Any]:
    name, router, capacity, selection, base, kept, causal = variant
    loss = base + 0.02 * seed + 0.004 * float(random.standard_normal())
    edges = np.linspace(-1, 1, 65)
    centres = (edges[1:] + edges[:-1]) / 2
    own, others = (np.exp(-(((centres - m) / w) ** 2)) for m, w in ((0.35, 0.15), (0.0, 0.2)))
    width = edges[1] - edges[0]
    histogram = {
        "edges": edges.tolist(),
        "own": (own / own.sum() / width).tolist(),
        "others": (others / others.sum() / width).tolist(),
    }
    return {
        "name": name,
        "router": router,
        "capacity": capacity,
        "seed": seed,
        "steps": steps,
        "tokens": 4096 * steps,
        "val_loss": loss,
        "val_loss_dropless": loss - (0.0 if selection == "dropless" else 0.003 + 0.002 * seed),
        "val_loss_by_domain": {d: loss + 0.3 * (i - 1.5) for i, d in enumerate(DOMAINS)},
        "kept_fraction": 0.97 * kept,
        "kept_fraction_eval": 0.97 * kept + (0.035 if name == "etr mass 0.7" else 0.004),
        "drop_rate": 1 - 0.97 * kept,
        "num_tokens_per_expert_mean": 512 * kept,
        "max_violation": 0.4 + 0.1 * float(random.random()),
        "step_time_seconds_median": 0.05 + 0.03 * kept + 0.001 * float(random.random()),
        "expert_flops_per_step": 6e9 * kept,
        "expert_flops_total": 6e9 * kept * steps,
        "parameters": 3_214_000,
        "active_parameters": 1_105_000,
        "selection": selection,
        "causal": causal,
        "metrics": metrics,
        "affinity_histogram": None if router == "baseline" else histogram,
    }


def many_variants(
    folder: Path, count: int, name: str = "", *, seeds: int = 1, steps: int = 16
) -> None:
    """A comparison of as many variants as asked for: kinds of a few, each with losses of its own.

    Args:
        folder: where to.
        count: variants.
        name: what each name ends with.
        seeds: of each.
        steps: of each run.
    """
    kinds: list[Variant] = []
    for place in range(count):
        again, kind = divmod(place, 4)
        _, router, capacity, selection, base, kept, causal = VARIANTS[kind]
        own = f"{place} {name}".strip() if place else "baseline"
        loss = base + 0.011 * again * (1 if place % 3 else -1)
        kinds.append((own, router, capacity, selection, loss, kept * 0.96**again, causal))
    sizes = {"variants": count, "layers": 2, "experts": 4}
    make_results(folder, seeds=seeds, steps=steps, kinds=kinds, **sizes)
