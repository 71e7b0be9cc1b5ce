"""Plans of the same sizes as a method's, by chance or by the size of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KINDS = ("random", "magnitude")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of a layer: who is to stay, or to have more bits, is higher."""

    expert: Tensor
    """Sum of squared weights, [E]."""
    matrix: Tensor
    """Mean squared weight of gate, up and down, [E, 3]; without a gate [E, 2]."""
    neuron: Tensor
    """Squared lengths of what writes and of what gates, multiplied, [E, I]."""

    def drawn(self, generator: torch.Generator) -> Scores:
        """Others of the same shapes, by chance."""
        found = {k: torch.rand(v.shape, generator=generator) for k, v in vars(self).items()}
        return Scores(**found)


def magnitudes(folder: Path) -> list[Scores]:
    """Of each layer of a folder, by the size of its weights."""
    from etr.hf.source import Source
    from etr.model.experts import EXPERTS, matrices_of

    source, found = Source.open(folder), []
    for prefix in source.layers():
        inside = {
            name.removeprefix(prefix + EXPERTS): tensor.make().double()
            for name, tensor in source.tensors.items()
            if name.startswith(prefix + EXPERTS)
        }
        each = matrices_of({k: v for k, v in inside.items() if not k.endswith("bias")})
        squares = torch.stack([value.square().sum((1, 2)) for value in each.values()], 1)
        first, down = next(iter(each.values())), each["down"]
        neuron = down.square().sum(1) * first.square().sum(2)
        sizes = torch.tensor([value[0].numel() for value in each.values()])
        found.append(Scores(expert=squares.sum(1), matrix=squares / sizes, neuron=neuron))
    return found


def drawn(magnitude: Sequence[Scores], seed: int) -> list[Scores]:
    """By chance."""
    generator = torch.Generator().manual_seed(seed)
    return [one.drawn(generator) for one in magnitude]


def highest(score: Tensor, count: int) -> list[int]:
    """Numbers of the highest, best first."""
    found: list[int] = score.flatten().argsort(descending=True, stable=True)[:count].tolist()
    return found


def _experts(plan: Any, scores: Sequence[Scores]) -> Any:
    """As many experts of each layer stay."""
    both = zip(plan["keep"], scores, strict=True)
    return {"keep": [sorted(highest(one.expert, len(kept))) for kept, one in both]}


def _neurons(plan: Any, scores: Sequence[Scores]) -> Any:
    """As many neurons of the model stay."""
    count = sum(len(kept) for layer in plan["keep"] for kept in layer)
    flat = torch.cat([one.neuron.flatten() for one in scores])
    stays = torch.zeros(len(flat), dtype=torch.bool)
    stays[highest(flat, count)] = True
    parts = stays.split([one.neuron.numel() for one in scores])
    rows = [part.view_as(one.neuron) for part, one in zip(parts, scores, strict=True)]
    return {"keep": [[row.nonzero().flatten().tolist() for row in layer] for layer in rows]}


def _groups(plan: Any, scores: Sequence[Scores]) -> Any:
    """As many experts of each layer are joined; the others are dealt out to them in turn."""
    groups = []
    for old, one in zip(plan["groups"], scores, strict=True):
        count = len(set(old))
        order = highest(one.expert, len(old))
        host = {expert: order[place % count] for place, expert in enumerate(order)}
        groups.append([host[expert] for expert in range(len(old))])
    return {**plan, "groups": groups}


def _bits(plan: Any, scores: Sequence[Tensor], each: int) -> Any:
    """The same bits, the most for the highest; `each` matrices in a row have the same."""
    old = [widths[::each] for widths in plan["bits"]]
    given = sorted((width for layer in old for width in layer), reverse=True)
    flat = torch.cat([score.flatten() for score in scores])
    bits = torch.empty(len(flat), dtype=torch.int64)
    bits[highest(flat, len(flat))] = torch.tensor(given)
    parts = bits.repeat_interleave(each).split([len(widths) for widths in plan["bits"]])
    return {"bits": [part.tolist() for part in parts]}


def _of_matrices(plan: Any, scores: Sequence[Scores]) -> Any:
    return _bits(plan, [one.matrix for one in scores], 1)


def _of_experts(plan: Any, scores: Sequence[Scores]) -> Any:
    return _bits(plan, [one.expert for one in scores], scores[0].matrix.shape[1])


def _masks(plan: Any, scores: Sequence[Scores]) -> Any:
    """As many neurons are shared, and as many an expert's, the same for each domain."""
    core, experts = [], []
    for shared, own, one in zip(plan["core"], plan["experts"], scores, strict=True):
        order = highest(one.neuron, len(shared) + len(own[0]))
        core.append(sorted(order[: len(shared)]))
        experts.append([sorted(order[len(shared) :])] * len(own))
    return {**plan, "core": core, "experts": experts}


def _tasks(plan: Any, scores: Sequence[Scores]) -> Any:
    """Other tasks become one: as many experts of as many tasks, by another order of the tasks."""
    found = []
    for old, one in zip(plan["of"], scores, strict=True):
        order = [number for number in highest(one.expert, len(old) + 1) if number < len(old)]
        mixed = [old[place] for place in order]
        first = list(dict.fromkeys(mixed))
        found.append([first.index(number) for number in mixed])
    return {**plan, "of": found}


Control = Callable[[Any, Sequence[Scores]], Any]
CONTROLS: dict[str, tuple[Control, tuple[str, ...]]] = {
    "easy_ep": (_experts, KINDS),
    "heapr": (_neurons, KINDS),
    "mc_smoe": (_groups, KINDS),
    "quantmoe": (_of_matrices, KINDS),
    "edgemoe": (_of_experts, KINDS),
    "read_me": (_masks, KINDS),
    "made_it": (_tasks, ("random",)),
}
"""Of methods that choose: the plan that chooses otherwise, and by what."""
