"""The layer in plain loops: the oracle that all tests compare with.

Nothing here is shared with the fast path beyond the layer's parameters and options. Selections are
lists of Python numbers; what carries gradients is written one token and one expert at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from etr.moe.experts import Bank, ExpertParams
from etr.moe.experts.nulls import NullExperts
from etr.moe.experts.stand_in import StandInExperts
from etr.moe.layer import MoE
from etr.moe.routing import Limit, Routing

Pair = tuple[int, int]  # token, expert


def grap(x: Tensor, num_experts: int) -> Tensor:
    """GrAP affinity from its definition: cosine of each token and each block vector, [T, E]."""
    hidden_size = x.shape[1]
    block = hidden_size // num_experts
    rows = []
    for token in x:
        row = []
        for e in range(num_experts):
            vector = torch.zeros_like(token)
            vector[e * block : (e + 1) * block] = num_experts / hidden_size
            norm = token.norm().clamp_min(1e-12) * vector.norm()
            row.append((token * vector).sum() / norm)
        rows.append(torch.stack(row))
    return torch.stack(rows) if rows else x.new_zeros(0, num_experts)


def top_k(scores: list[float], k: int) -> list[int]:
    """The k best experts of one token; ties go to the lower expert."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def capacity(factor: float, num_tokens: int, top_k: int, num_experts: int, least: int = 1) -> int:
    """Tokens per expert at a capacity factor."""
    return max(least, math.ceil(factor * num_tokens * top_k / num_experts - 1e-6))


def mass_prefix(gates: list[float], rho: float) -> int:
    """Shortest prefix of a queue (best first) that holds a share rho of its summed gates."""
    goal, running = (rho - 1e-6) * sum(gates), 0.0
    for count, gate in enumerate(gates):
        if running >= goal:
            return count
        running += gate
    return len(gates)


def choosers(routing: Routing, *, by_score: bool) -> list[list[int]]:
    """Pair numbers of each expert's choosers in the order in which they are served."""
    expert = routing.expert.tolist()
    score = routing.score.tolist() if by_score and routing.score is not None else None
    queues = []
    for e in range(routing.num_experts):
        queue = [p for p in range(len(expert)) if expert[p] == e]
        if score is not None:
            queue.sort(key=lambda p: (-score[p], p))
        queues.append(queue)
    return queues


def keep(routing: Routing, limit: Limit, *, by_score: bool, rank_all: bool = False) -> set[Pair]:
    """Kept (token, expert) pairs.

    Args:
        routing: the choices.
        limit: what experts may keep.
        by_score: serve by falling score instead of by position.
        rank_all: rank a chooser among all valid tokens instead of among choosers.
    """
    kept: set[Pair] = set()
    token = routing.token.tolist()
    valid = routing.valid_mask.tolist()
    scores = None if routing.scores is None else routing.scores.tolist()
    for e, queue in enumerate(choosers(routing, by_score=by_score)):
        if limit.min_score is not None and scores is not None:
            least = float(limit.min_score[e])
            queue = [p for p in queue if scores[token[p]][e] >= least]
        if limit.capacity is not None:
            count = int(limit.capacity[e])
            if rank_all and scores is not None:
                order = [t for t in range(len(valid)) if valid[t]]
                order.sort(key=lambda t: (-scores[t][e], t))
                best = set(order[:count])
                queue = [p for p in queue if token[p] in best]
            else:
                queue = queue[:count]
        kept.update((token[p], e) for p in queue)
    return kept


def weights(
    routing: Routing, kept: set[Pair], normalize: str, num_weighed: int | None = None
) -> dict[Pair, Tensor]:
    """Combine weight of every kept pair; with `num_weighed`, of the first so many experts."""
    gates = {
        (t, e): routing.gate[p]
        for p, (t, e) in enumerate(
            zip(routing.token.tolist(), routing.expert.tolist(), strict=True)
        )
        if e < routing.num_experts
    }
    if normalize == "none":
        return {pair: gates[pair] for pair in kept}
    counted = gates if normalize == "chosen" else {pair: gates[pair] for pair in kept}
    if num_weighed is not None:
        counted = {pair: gate for pair, gate in counted.items() if pair[1] < num_weighed}
    result = {}
    for t, e in kept:
        if num_weighed is not None and e >= num_weighed:
            result[t, e] = gates[t, e] * 0
            continue
        total = sum(gate for (token, _), gate in counted.items() if token == t)
        result[t, e] = gates[t, e] / total if total > 0 else gates[t, e] * 0
    return result


def feed_forward(token: Tensor, params: ExpertParams, expert: int) -> Tensor:
    """One token [H] through one expert."""
    hidden = params.up[expert] @ token
    if params.up_bias is not None:
        hidden = hidden + params.up_bias[expert]
    half = hidden.shape[0] // 2
    if params.activation == "swiglu":
        gate = hidden[:half]
        hidden = gate * torch.sigmoid(gate) * hidden[half:]
    elif params.activation == "clamped_swiglu":
        limit, alpha = params.clamp
        gate, linear = hidden[:half].clamp(max=limit), hidden[half:].clamp(-limit, limit)
        hidden = gate * torch.sigmoid(alpha * gate) * (linear + 1)
    elif params.activation == "gelu":
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    elif params.activation == "silu":
        hidden = hidden * torch.sigmoid(hidden)
    else:
        hidden = torch.clamp(hidden, min=0) ** 2
    out = params.down[expert] @ hidden
    return out if params.down_bias is None else out + params.down_bias[expert]


def expert_output(bank: Bank, token: Tensor, expert: int) -> Tensor:
    """What one choice means for one token [H], before any weight."""
    for part in bank.parts:
        if expert < part.num_experts:
            return feed_forward(token, part.params(token.dtype), expert)
        expert -= part.num_experts
    assert isinstance(bank, NullExperts)
    if bank.kind == "copy":
        return token
    return token * 0 if bank.constants is None else bank.constants[expert].to(token.dtype)


def dropped_gates(routing: Routing, kept: set[Pair], token: int) -> list[Tensor]:
    """Gates of the choices of a token that its experts did not keep."""
    pairs = enumerate(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
    return [
        routing.gate[p]
        for p, (t, e) in pairs
        if t == token and e < routing.num_experts and (t, e) not in kept
    ]


def stood_in(bank: StandInExperts, token: Tensor, gates: list[Tensor]) -> Tensor:
    """What one token [H] gets for dropped choices of these gates."""
    down, up, bias = (value.to(token.dtype) for value in bank.stand_in.parameters())
    total = torch.zeros_like(token)
    for gate in gates:
        total = total + gate.to(token.dtype) * (up @ (down @ token) + bias)
    return total


def moe(layer: MoE, x: Tensor, routing: Routing, limit: Limit) -> tuple[Tensor, set[Pair]]:
    """Output of the layer for tokens x [T, H], given what its router wants and what is allowed.

    Returns:
        y [T, H] and the kept pairs.
    """
    rank_all = layer.traits.expert_pool == "all"
    kept = keep(routing, limit, by_score=layer.rank_by == "score", rank_all=rank_all)
    num_weighed = layer.config.bank_config.num_weighed(layer.config.num_experts)
    weight = weights(routing, kept, layer.normalize, num_weighed)
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t])
        for e in range(routing.num_experts):
            if (t, e) in kept:
                scale = weight[t, e].to(x.dtype) * layer.config.routed_scale
                total = total + scale * expert_output(layer.bank, x[t], e)
        if isinstance(layer.bank, StandInExperts):
            total = total + stood_in(layer.bank, x[t], dropped_gates(routing, kept, t))
        if layer.shared_experts is not None:
            shared = feed_forward(x[t], layer.shared_experts.params(x.dtype), 0)
            if layer.shared_gate is not None:
                shared = torch.sigmoid(layer.shared_gate.weight[0] @ x[t]) * shared
            total = total + shared
        rows.append(total)
    return (torch.stack(rows) if rows else x.new_zeros(x.shape)), kept


def balance_loss(routing: Routing) -> Tensor:
    """``E * sum_e f_e P_e`` over the valid tokens of one micro-batch, unscaled."""
    assert routing.probs is not None
    tokens = [t for t, valid in enumerate(routing.valid_mask.tolist()) if valid]
    chosen = [e for e in routing.expert.tolist() if e < routing.num_experts]
    total = routing.probs.new_zeros(())
    for e in range(routing.num_experts):
        share = chosen.count(e) / max(len(chosen), 1)
        for t in tokens:
            total = total + share * routing.probs[t, e] / len(tokens)
    return routing.num_experts * total
