"""MC-SMoE: merge experts whose routers' logits are alike, and keep little of them (2310.01334)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from etr.methods.card import Card, Row
from etr.model import TRANSFORMS, LayerTensors
from etr.model.bits import num_matrices
from etr.model.experts import Calibrated, Values, check_numbers, lists_of, rebuilt
from etr.model.low_rank import DropRows, rank_of, with_rows
from etr.model.transform import Stats
from etr.moe.config import MoEConfig
from etr.moe.experts import BANKS
from etr.moe.experts.low_rank_rows import LowRankRows
from etr.moe.experts.merged import Merged
from etr.moe.experts.runs import text_of
from etr.moe.view import LayerView


@dataclass(frozen=True, kw_only=True)
class McSmoe(Calibrated):
    """Merges each expert into a dominant one of its layer, weighed by how often they are used.

    Dominant are the most used experts over all layers, at least one in each. The others join the
    one whose logits are most like theirs on the text; before they are averaged their neurons are
    put in the order that fits the dominant one best. The router stays, and its choices mean the
    merged weights. With a ratio each matrix left is L R + S: at first exactly, until training
    leaves a share of the rows of S.
    """

    name = "mc_smoe"
    summary = "merge experts into the most used ones, their neurons aligned, by similar logits"
    needs = ("outputs",)

    keep: float = 0.5
    """Share of the experts of the whole model that are left."""
    align: bool = True
    """Put neurons in the dominant expert's order before they are averaged."""
    store: Literal["merged", "copies"] = "merged"
    """merged: what is left is stored once. copies: for each choice, which families of transformers
    can hold, but is not smaller."""
    ratio: float | None = None
    """Share of a matrix's numbers that L and R have. None: matrices stay whole."""
    sparse: float = 0.25
    """With a ratio, share of S that etr finetune MODEL --teacher SRC leaves; drop_rows then stores
    no more. 0: there is no S."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be a share of the experts, over 0 and up to 1")
        if self.store not in ("merged", "copies"):
            raise ValueError(f"store={self.store!r} must be merged or copies")
        if not 0 <= self.sparse <= 1:
            raise ValueError(f"sparse={self.sparse} must be a share of S, from 0 to 1")
        if self.ratio is None:
            return
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} must be a share of the numbers, up to 1, or None")
        if self.protect or self.store == "copies":
            raise ValueError(
                f"ratio={self.ratio} with protect={self.protect!r} and store={self.store!r}: every "
                "expert gets a low rank, and is stored once"
            )

    def changes_function(self) -> str | None:
        if self.keep < 1:
            return f"keep={self.keep} merges experts"
        return "experts have a low rank" if self.ratio is not None and not self.sparse else None

    def observe(self, view: LayerView) -> Stats:
        routing = view.routing
        if routing.logits is None:
            raise ValueError("transform 'mc_smoe' compares logits, and the router has none")
        logits = routing.logits.double()[routing.valid_mask]
        return {
            "tokens": routing.num_choices_per_expert(),
            "products": logits.T @ logits,
        }

    def plan(self, stats: Sequence[Stats], layers: Sequence[MoEConfig]) -> Any:
        usage = [one["tokens"].double() / one["tokens"].sum().clamp_min(1) for one in stats]
        dominant = self._dominant([one["tokens"] for one in stats], usage, layers)
        alone = self.protected(layers)
        groups = []
        for place, one in enumerate(stats):
            hosts = [e for e in dominant[place] if e not in alone[place]]
            length = one["products"].diagonal().sqrt().clamp_min(1e-30)
            cosine = one["products"] / length / length[:, None]
            nearest = [hosts[int(row[hosts].argmax())] if hosts else 0 for row in cosine]
            own = set(dominant[place])
            groups.append([e if e in own else nearest[e] for e in range(len(nearest))])
        return {"groups": groups, "usage": [shares.tolist() for shares in usage]}

    def _dominant(
        self, tokens: Sequence[Tensor], usage: Sequence[Tensor], layers: Sequence[MoEConfig]
    ) -> list[list[int]]:
        """Of each layer, the experts that others join; protected ones, which stay, too."""
        ranked = []
        for score, shares in zip(self.judged(tokens, usage, layers), usage, strict=True):
            score[int(shares.argmax())] = torch.inf
            ranked.append(score)
        for place, alone in enumerate(self.protected(layers)):
            free = [e for e in range(len(ranked[place])) if e not in alone]
            if free:  # somebody whom others may join
                ranked[place][free[int(usage[place][free].argmax())]] = torch.inf
        flat = torch.cat(ranked)
        count = max(round(self.keep * len(flat)), int(flat.isposinf().sum()))
        order = flat.argsort(descending=True, stable=True)[:count]
        chosen = torch.zeros(len(flat), dtype=torch.bool).index_fill(0, order, True)
        return [
            part.nonzero().flatten().tolist() for part in chosen.split([len(s) for s in ranked])
        ]

    def describe(self, plan: Any, layers: Sequence[MoEConfig]) -> str:
        left = sum(len(set(groups)) for groups in plan["groups"])
        said = f"merges {sum(map(len, plan['groups']))} experts into {left}"
        if self.ratio is None:
            return said
        ranks = "+".join(dict.fromkeys(str(self.bank(layer).rank) for layer in layers))
        beside = f" and rows beside it, of which training leaves {self.sparse:.0%}"
        return f"{said}, of rank {ranks}{beside if self.sparse else ''}"

    def bank(self, layer: MoEConfig, of: str = "") -> LowRankRows:
        """The bank of a layer that gets a low rank."""
        assert self.ratio is not None
        rank = rank_of(self.ratio, layer.intermediate_size, layer.hidden_size)
        if self.sparse:
            return LowRankRows(rank=rank, of=of, left=self.sparse)
        return LowRankRows(rank=rank, of=of, rows=text_of([0] * num_matrices(layer)))

    def check(self, plan: Any, layers: Sequence[MoEConfig]) -> None:
        super().check(plan, layers)
        usage = lists_of(plan, "usage", layers)
        for place, (groups, layer) in enumerate(
            zip(lists_of(plan, "groups", layers), layers, strict=True)
        ):
            what = f"groups of layer {place}"
            if self.ratio is not None and layer.expert_bias:
                raise ValueError("expert_bias=True: experts with biases get no low rank")
            if not all(
                isinstance(values, list) and len(values) == layer.num_experts
                for values in (groups, usage[place])
            ):
                raise ValueError(
                    f"the plan's {what} must name {layer.num_experts} experts, and their usage"
                )
            if not all(type(host) is int for host in groups):
                raise ValueError(f"the plan's {what} must be numbers: {groups!r}")
            check_numbers(list(dict.fromkeys(groups)), layer.num_experts, what)
            if any(groups[host] != host for host in groups):
                raise ValueError(f"the plan's {what} must join experts that join none: {groups}")

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        groups, usage = plan["groups"][place], plan["usage"][place]
        if self.ratio is None and groups == list(range(len(groups))):
            return tensors
        copies = self.store == "copies"
        picked = groups if copies else sorted(set(groups))

        def change(values: Values) -> Values:
            made = merged(values, groups, usage, self.align)
            return self._stored({name: value[picked] for name, value in made.items()})

        def like(values: Values) -> Values:
            return self._stored({name: value[: len(picked)] for name, value in values.items()})

        return rebuilt(tensors, change, like)

    def _stored(self, values: Values) -> Values:
        """Experts as the bank has them; shapes alone on the meta device."""
        if self.ratio is None:
            return values
        rank = rank_of(self.ratio, *values["down_proj"].shape[1:])
        return with_rows(values, rank, every=self.sparse > 0)

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        groups = plan["groups"][place]
        alone = groups == list(range(len(groups)))
        if self.ratio is None and (self.store == "copies" or alone):
            return layer
        hosts = sorted(set(groups))
        of = "" if alone else "+".join(str(hosts.index(g)) for g in groups)
        return replace(layer, experts=Merged(of=of) if self.ratio is None else self.bank(layer, of))


def merged(
    values: Values, groups: Sequence[int], usage: Sequence[float], align: bool = True
) -> Values:
    """Experts of which those that others join hold the mean of their group.

    Args:
        values: of E experts.
        groups: of each, the expert that it joins.
        usage: of each, its weight in the mean; where a group's are 0, all weigh alike.
        align: put neurons in the order of the expert that is joined.
    """
    found = {name: value.clone() for name, value in values.items()}
    for host in sorted(set(groups)):
        members = [expert for expert, group in enumerate(groups) if group == host]
        if len(members) == 1:
            continue
        weight = torch.tensor([usage[expert] for expert in members], dtype=torch.float64)
        weight = (
            weight / weight.sum() if weight.sum() > 0 else torch.full_like(weight, 1 / len(weight))
        )
        total = {
            name: torch.zeros_like(value[host], dtype=torch.float64)
            for name, value in values.items()
        }
        for expert, share in zip(members, weight.tolist(), strict=True):
            one = {name: value[expert] for name, value in values.items()}
            if align and expert != host:
                one = reordered(one, order_like({n: v[host] for n, v in values.items()}, one))
            for name, value in one.items():
                total[name] += share * value.double()
        for name, value in total.items():
            found[name][host] = value.to(found[name].dtype)
    return found


def order_like(host: Values, other: Values) -> Tensor:
    """Order of another expert's neurons in which products with the host's sum up highest, [I]."""
    from scipy.optimize import linear_sum_assignment

    products = host["down_proj"].double().T @ other["down_proj"].double()
    for name in host.keys() & {"gate_up_proj", "up_proj"}:
        halves = 2 if name.startswith("gate") else 1
        pieces = zip(host[name].chunk(halves), other[name].chunk(halves), strict=True)
        products = products + sum(a.double() @ b.double().T for a, b in pieces)
    return torch.as_tensor(linear_sum_assignment(products.numpy(), maximize=True)[1])


def reordered(expert: Values, order: Tensor) -> Values:
    """An expert with its neurons in another order, which computes the same."""
    found = dict(expert)
    for name, value in expert.items():
        if name == "down_proj":
            found[name] = value[:, order]
        elif name != "down_proj_bias":
            halves = value.chunk(2 if name.startswith("gate") else 1)
            found[name] = torch.cat([half[order] for half in halves])
    return found


CARD = Card(
    name="mc_smoe",
    title="MC-SMoE",
    summary="merges experts into the most used ones of the model, their neurons aligned first",
    paper="2310.01334",
    level="model",
    branch="merging",
    rows=(
        Row(table=TRANSFORMS, kind=McSmoe),
        Row(table=TRANSFORMS, kind=DropRows),
        Row(table=BANKS, kind=LowRankRows),
    ),
    moves=("loss", "bytes", "memory"),
    claim=(
        "Experts whose neurons are another's in another order merge back into it within 1e-12, "
        "where without alignment the output changes by more than 0.1; on a small language model "
        "with half of the experts left, the loss aligned is at least 0.08 below that without, and "
        "with a quarter of the numbers left, of rank and rows alike, 60 steps from the model "
        "before end below low rank alone and at least 0.05 below rows that go by chance."
    ),
    departs=(
        "The highest usage over all layers decides who is dominant, by exact comparison, so that "
        "keeping all is the identity. Rows of S compete within a layer, by its numbers, over the "
        "first 0.7 of whatever training is attached; the released code ranks those of all layers "
        "and waits for steps that it counts. Experts alone learn, from the model before merging; "
        "what runs is the matrix that L R + S make."
    ),
)
