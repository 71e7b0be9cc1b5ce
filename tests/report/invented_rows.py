"""Invented diagnostics, profiles, alarms and traces: what a run writes besides its steps."""

from pathlib import Path
from typing import Any

import numpy as np

from etr.trace import LayerRouting, TokenRows, TraceInfo, TraceWriter

DOMAINS = ("python", "c++ headers", "mathematics")
TEXT = "def mean(values):\n    return sum(values) / len(values)  # of at least one\n"


def layer_extras(choices: list[int], kept: float, has_cosine: bool) -> dict[str, Any]:
    capacity = kept * sum(choices) / len(choices)
    return {
        "capacity": capacity,
        "capacity_lower_bound": 0.5 * capacity + 3 if has_cosine else None,
        "kept_affinity_mass": min(1.0, 0.1 + kept),
        "router_grad_norm": 0.1,
    }


def diagnostics(
    step: int, layers: int, experts: int, has_scores: bool, random: np.random.Generator
) -> dict[str, Any]:
    """One row; `step` 0 is before training."""
    grown = min(step / 100, 1.0)
    tokens = 24
    expert = np.sort(random.integers(0, experts, tokens))
    same = (expert[:, None] == expert[None]).astype(float)
    correlation = np.clip(grown * 0.8 * same + 0.05 * random.standard_normal(same.shape), -1, 1)
    np.fill_diagonal(correlation, 1.0)
    return {
        "kind": "diagnostics",
        "step": step,
        "tokens": 4096 * step,
        "expert_flops": 0.0,
        "elapsed_seconds": 0.1 * step,
        "domains": list(DOMAINS),
        "layers": [_layer(grown, experts, has_scores, random) for _ in range(layers)],
        "token_correlation": correlation.round(4).tolist(),
        "token_expert": expert.tolist(),
    }


def _layer(
    grown: float, experts: int, has_scores: bool, random: np.random.Generator
) -> dict[str, Any]:
    similarity = 0.3 * (1 - grown) * np.ones((experts, experts))
    np.fill_diagonal(similarity, 1.0)
    edges = np.linspace(-1, 1, 33)
    centres = (edges[1:] + edges[:-1]) / 2
    own, others = (np.exp(-(((centres - m) / 0.2) ** 2)) for m in (0.3 * grown, 0.0))
    scores = {
        "affinity_edges": edges.tolist(),
        "affinity_own": (own / own.sum() * 16).tolist(),
        "affinity_others": (others / others.sum() * 16).tolist(),
    }
    return {
        "calinski_harabasz_all": 0.1 + 0.4 * grown,
        "calinski_harabasz_kept": 0.12 + 0.7 * grown,
        "calinski_harabasz_trimmed": None if grown == 0 else 0.12 + 0.5 * grown,
        "expert_similarity": similarity.tolist(),
        "domain_expert": random.multinomial(
            400, random.dirichlet(np.full(experts, 3.0), 1)[0], size=len(DOMAINS)
        ).tolist(),
        "mutual_information_bits": 0.2 * grown,
        **(scores if has_scores else {}),
    }


def profile(step: int) -> dict[str, Any]:
    names = ("aten::bmm", "aten::mm", "autograd::engine::evaluate_function: BmmBackward0", "gelu")
    return {
        "kind": "profile",
        "step": step,
        "tokens": 4096 * step,
        "expert_flops": 0.0,
        "elapsed_seconds": 0.1 * step,
        "computation_seconds": 0.05,
        "communication_seconds": 0.02,
        "overlapped_seconds": 0.008,
        "idle_seconds": 0.006,
        "operators": [
            {"name": name, "seconds": 0.03 / (place + 1), "calls": 12 + place}
            for place, name in enumerate(names)
        ],
    }


def alarm(step: int, layer: int | None = 1) -> dict[str, Any]:
    return {
        "kind": "alarm",
        "step": step,
        "tokens": 4096 * step,
        "expert_flops": 0.0,
        "elapsed_seconds": 0.1 * step,
        "name": "collapsed_expert",
        "layer": layer,
        "message": "no token reached expert 3 for 20 steps; raise aux_alpha, or try another seed",
    }


def write_trace(
    folder: Path, *, layers: int = 2, experts: int = 8, text: bool = True, top_k: int = 1
) -> Path:
    """A trace.parquet of a text in each domain, every fifth token dropped."""
    path = folder / "trace.parquet"
    letters = len(TEXT)
    tokens = TokenRows(
        sequence=np.repeat(np.arange(len(DOMAINS)), letters),
        position=np.tile(np.arange(letters), len(DOMAINS)),
        token_id=np.tile(np.frombuffer(TEXT.encode(), np.uint8), len(DOMAINS)).astype(np.int32),
        text=list(TEXT * len(DOMAINS)) if text else None,
        domain=[domain for domain in DOMAINS for _ in range(letters)],
    )
    count = len(tokens.sequence)
    choices = np.arange(count * top_k)
    routing = [
        LayerRouting(
            counts=np.full(count, top_k),
            experts=(choices // 4 + layer) % experts,
            weights=np.full(count * top_k, 0.5, np.float32),
            affinities=None,
            kept=(choices // top_k) % 5 != 4,
        )
        for layer in range(layers)
    ]
    info = TraceInfo(
        num_experts=experts,
        num_layers=layers,
        top_k=top_k,
        router="etr",
        selection="threshold",
        affinity="none",
    )
    with TraceWriter(path, info) as writer:
        writer.write(tokens, routing)
    return path
