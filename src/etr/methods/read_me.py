"""Read-ME: a dense model's neurons as experts of domains, one router for all (2410.19123)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors, LazyTensor
from etr.model.experts import EXPERTS, OfExperts, Values, best, check_numbers, lists_of, rebuilt
from etr.model.transform import Stats
from etr.moe.config import MoEConfig
from etr.moe.context import RouterInput
from etr.moe.experts.uniform import Uniform
from etr.moe.experts.widths import Widths
from etr.moe.routers import ROUTERS, Router, RouterConfig, RouterTraits
from etr.moe.routers.linear import SoftmaxRouter
from etr.moe.routing import Scores
from etr.moe.view import LayerView
from etr.moe.watch import expert_neurons

SAMPLE = 512
"""Tokens of each domain on which the router is fitted."""
LEVELS = 5
"""Nested sets of a token's strongest neurons."""


@dataclass(frozen=True, kw_only=True)
class Ahead(RouterConfig):
    """One choice for all MoE layers: the first scores tokens, the others follow it.

    Every weight is 1, so that it learns by losses on its probabilities alone.
    """

    name = "ahead"
    paper = "2410.19123"
    summary = "learned linear router of the first MoE layer, whom all others follow"

    distance: int = 0
    """MoE layers since the one that chooses, whose logits each passes on; 0: this one does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance < 0:
            raise ValueError(f"distance={self.distance} must be at least 0 layers")

    @property
    def traits(self) -> RouterTraits:
        return RouterTraits(
            normalize="none", gates_are_probs=False, reads_before=True, default_capacity="none"
        )

    def build(self, hidden_size: int, num_experts: int, top_k: int) -> Router:
        kind = _Follows if self.distance else _First
        return kind(self, hidden_size, num_experts, top_k)


class _First(SoftmaxRouter):
    def of_logits(self, logits: Tensor) -> Scores:
        return _of_weight_one(logits)


class _Follows(Router):
    config: Ahead

    def scores(self, x: Tensor, inputs: RouterInput) -> Scores:
        wanted = (len(x), self.num_experts)
        if inputs.before is None or inputs.before.shape != wanted:
            found = None if inputs.before is None else tuple(inputs.before.shape)
            raise ValueError(
                f"router 'ahead:distance={self.config.distance}' takes the logits {wanted} of the "
                f"layer before, which are {found}: layers must be of one model, and alike"
            )
        return _of_weight_one(inputs.before.to(x.dtype))


def _of_weight_one(logits: Tensor) -> Scores:
    probs = logits.softmax(-1)
    gates = 1 + 0 * probs  # with a gradient of 0, which ranks that share a batch expect
    return Scores(scores=probs, logits=logits, gates=gates, probs=probs)


@dataclass(frozen=True, kw_only=True)
class ReadMe(OfExperts):
    """Makes of a dense feed-forward an expert for each domain of the text, and what all share.

    A domain's neurons are those of the highest mean absolute activation on its tokens. Neurons that
    all domains have become a shared expert, the others of each domain a routed one; a neuron that
    no domain has is gone. One linear router, of what the first layer takes, chooses for all layers;
    it is fitted to how far a token's own strongest neurons lie in each domain's.
    """

    name = "read_me"
    summary = (
        "a dense model to an expert for each domain of your text, with one router for all layers"
    )
    needs = ("task",)

    keep: float = 0.5
    """Share of the neurons that a domain has. 1 leaves the model as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be a share of the neurons, over 0 and up to 1")
        if self.protect:
            raise ValueError(f"protect={self.protect!r}: a dense layer is taken apart as a whole")

    def changes_function(self) -> str | None:
        return None if self.keep == 1 else f"a token has keep={self.keep} of the neurons"

    def count(self, width: int) -> int:
        """Neurons of a domain, at least 1."""
        return max(1, int(self.keep * width + 1e-6))

    def observe(self, view: LayerView) -> Stats:
        if view.routing.num_experts != 1:
            raise ValueError(
                f"a layer has {view.routing.num_experts} experts; transform {self.name!r} takes a "
                "dense model"
            )
        ((pair, active, _),) = expert_neurons(view)
        token, size = view.routing.token[pair], active.abs()
        domain = torch.zeros_like(token) if view.task is None else view.task[token]
        found: Stats = {}
        for number in domain.unique().tolist():
            mine = domain == number
            found[f"activation.{number}"] = size[mine].double().sum(0)
            found[f"tokens.{number}"] = mine.sum()
            rows = mine.nonzero().flatten()[:SAMPLE]
            found[f"levels.{number}"] = levels_of(size[rows], self.count(size.shape[1]))
            found[f"x.{number}"] = view.x[token[rows]].double()
        return found

    def gather(self, total: Stats, more: Stats) -> Stats:
        found = dict(total)
        for name, value in more.items():
            if name not in total:
                found[name] = value
            elif name.startswith(("x.", "levels.")):
                found[name] = torch.cat([total[name], value])[:SAMPLE]
            else:
                found[name] = total[name] + value
        return found

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        domains = sorted(int(key[7:]) for key in stats[0] if key.startswith("tokens."))
        core, experts, target = [], [], torch.zeros(0)
        for one in stats:
            mean = [one[f"activation.{d}"] / one[f"tokens.{d}"] for d in domains]
            masks = masks_of(torch.stack(mean), self.count(len(mean[0])))
            shared = masks.all(0)
            core.append(shared.nonzero().flatten().tolist())
            experts.append([(own & ~shared).nonzero().flatten().tolist() for own in masks])
            levels = torch.cat([one[f"levels.{d}"] for d in domains])
            wanted = targets(levels, masks)
            target = wanted if not len(target) else target + wanted
        x = torch.cat([stats[0][f"x.{d}"] for d in domains])
        own = torch.cat([torch.full((len(stats[0][f"x.{d}"]),), i) for i, d in enumerate(domains)])
        weight = fitted(x, target / len(stats))
        right = (x @ weight.T).argmax(-1) == own.to(x.device)
        return {
            "domains": domains,
            "core": core,
            "experts": experts,
            "own_domain": float(right.double().mean()),
            "router": weight.tolist(),
        }

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        neurons = " + ".join(str(len(core)) for core in plan["core"])
        routed = " + ".join(str(len(each[0])) for each in plan["experts"])
        found = f"{len(plan['router'])} domains share {neurons} neurons and have {routed} each"
        own = plan.get("own_domain")
        return found if own is None else f"{found}; {own:.1%} of the tokens go to their own"

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        both = zip(lists_of(plan, "core", layers), lists_of(plan, "experts", layers), strict=True)
        router = torch.tensor(plan.get("router") or [])
        for place, ((core, experts), layer) in enumerate(zip(both, layers, strict=True)):
            if layer.num_experts != 1 or layer.num_shared_experts or layer.expert_bias:
                raise ValueError(
                    f"layer {place} has {layer.num_experts} experts and "
                    f"{layer.num_shared_experts} shared ones (biases: {layer.expert_bias}); "
                    f"transform {self.name!r} takes a dense model"
                )
            if not isinstance(experts, list) or router.shape != (len(experts), layer.hidden_size):
                raise ValueError(
                    f"the plan's router has shape {tuple(router.shape)}; it must have a row of "
                    f"{layer.hidden_size} for each expert of layer {place}"
                )
            for expert in experts:
                check_numbers(core + expert, layer.intermediate_size, f"neurons of layer {place}")
            if len({len(expert) for expert in experts}) != 1:
                raise ValueError(f"the plan's experts of layer {place} must be of one width")

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        if self.keep == 1:
            return tensors
        core, experts = plan["core"][place], plan["experts"][place]
        old = {name: tensor for name, tensor in tensors.items() if name.startswith(EXPERTS)}
        made = rebuilt(old, partial(_taken_apart, core=core, experts=experts))
        found = {}
        for key, tensor in made.items():
            name = key.replace(f"{EXPERTS}shared.", "shared_experts.")
            found[name] = replace(tensor, name=name)
        router = tensors["router.weight"]
        weight = torch.tensor(plan["router"], dtype=torch.float64)
        if not place:
            found["router.weight"] = LazyTensor(
                name=router.name,
                shape=tuple(weight.shape),
                dtype=router.dtype,
                make=partial(weight.to, router.dtype),
            )
        return found

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        if self.keep == 1:
            return layer
        core, experts = plan["core"][place], plan["experts"][place]
        width = len(experts[0])
        return replace(
            layer,
            num_experts=len(experts),
            top_k=1,
            intermediate_size=max(1, width),
            experts=Uniform() if width else Widths(widths=f"{len(experts)}x0"),
            num_shared_experts=1 if core else 0,
            shared_intermediate_size=len(core) or None,
            router=Ahead(distance=place),
            capacity="none",
            normalize=None,
            losses="",
            routed_scale=1.0,
        )


def _taken_apart(values: Values, core: list[int], experts: list[list[int]]) -> Values:
    """Some neurons of the one expert as experts, and others as ``shared``."""
    each = [_neurons(values, numbers) for numbers in experts]
    part = "" if experts[0] else "groups.0."  # as `Widths` has them
    found = {part + name: torch.cat([one[name] for one in each]) for name in values}
    if core:
        found |= {f"shared.{name}": value for name, value in _neurons(values, core).items()}
    return found


def _neurons(values: Values, numbers: Sequence[int]) -> Values:
    """Some neurons of the one expert, as one."""
    found = {}
    for name, value in values.items():
        index = torch.tensor(numbers, dtype=torch.int64, device=value.device)
        halves = value.chunk(2, dim=1) if name.startswith("gate_up") else [value]
        dim = 2 if name == "down_proj" else 1
        found[name] = torch.cat([half.index_select(dim, index) for half in halves], dim=1)
    return found


def masks_of(activation: Tensor, count: int) -> Tensor:
    """Of each domain its strongest neurons, of equal ones the first; bool [D, I].

    Args:
        activation: mean absolute one, float [D, I].
        count: neurons of each.
    """
    return torch.stack([best(row, count) for row in activation.cpu()])


def levels_of(size: Tensor, count: int) -> Tensor:
    """In how many nested sets of a token's strongest neurons each is, uint8 [T, I].

    Args:
        size: absolute activations, float [T, I].
        count: neurons of the largest set; the others have fifths of it.
    """
    rank = size.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    sizes = [-(-count * level // LEVELS) for level in range(1, LEVELS + 1)]
    return sum((rank < one).to(torch.uint8) for one in sizes)  # type: ignore[return-value]


def targets(levels: Tensor, masks: Tensor) -> Tensor:
    """What a router should say of tokens in one layer: probabilities of domains, float64 [T, D].

    A token's score of a domain is the share of its nested sets that lie in the domain's neurons,
    less the mean over domains, times 10. Three quarters of what is wanted are the best domain,
    smoothed by half, and a quarter is the softmax of the scores.

    Args:
        levels: of `levels_of`, [T, I].
        masks: bool [D, I].
    """
    weights = levels.double()
    score = weights @ masks.double().to(levels.device).T / weights.sum(1, keepdim=True)
    score = 10 * (score - score.mean(1, keepdim=True))
    hard = F.one_hot(score.argmax(1), len(masks)).double()
    return 0.75 * (0.5 * hard + 0.5 / len(masks)) + 0.25 * score.softmax(1)


def fitted(x: Tensor, target: Tensor, steps: int = 200) -> Tensor:
    """The linear router [D, H] whose probabilities are nearest to those wanted (cross-entropy).

    Args:
        x: tokens, float64 [T, H].
        target: float64 [T, D].
    """
    with torch.enable_grad():
        weight = x.new_zeros(target.shape[1], x.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            found = F.cross_entropy(x @ weight.T, target) + 1e-4 * weight.square().sum()
            found.backward()
            return found

        optimizer.step(loss)
    return weight.detach()


CARD = Card(
    name="read_me",
    title="Read-ME",
    summary="a dense model's neurons as experts of domains, with one choice for all layers",
    paper=Ahead.paper,
    level="model",
    branch="expert design",
    rows=(Row(table=TRANSFORMS, kind=ReadMe), Row(table=ROUTERS, kind=Ahead)),
    moves=("loss", "FLOPs", "bytes", "memory"),
    claim=(
        "Of a feed-forward of 4 planted domains half of the neurons, those of a domain, are off by "
        "at most 0.5 of what another's are; all layers choose alike; a memory that is told the "
        "routes has Belady's hits, which are no fewer than LRU's; keep = 1 changes no bit."
    ),
    departs=(
        "The router is linear and reads what the first layer's experts take, not ids through a "
        "transformer of its own: choices are known before the first experts run, not before the "
        "model. Domains are those that the text is labelled with. A mask has the N-th neuron too. "
        "Router and experts are not tuned in turns: with weights of 1 the router stands still. "
        "Requests are not batched by route."
    ),
)
