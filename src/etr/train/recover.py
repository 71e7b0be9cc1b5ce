"""After a router swap: teach the new router the old one's choices, and measure each step.

Experts stay as they are. What a checkpoint's experts learned, they learned from the tokens that its
old router sent them, so the new router is trained, for a few steps, to send them the same. After
that, if asked for, the whole model trains while the directions turn to the fixed frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from etr.data import Batch, DataConfig, OpenedData, TokenLoader, held_out_batches
from etr.evaluate import calibrate, evaluate
from etr.hf import EtrForCausalLM
from etr.hf.swap_router import set_temperatures, swap_router
from etr.moe import MoE, moe_layers, reconfigured, selecting, set_eval_selection
from etr.moe.affinity import router_dtype
from etr.moe.config import parse_capacity
from etr.moe.routers.token_choice import LinearRouter
from etr.moe.select import top_experts
from etr.moe.watch import LayerView, watch
from etr.train.config import OptimizerConfig
from etr.train.into_fixed import check_blocks, into_fixed, number_experts
from etr.train.model import widen_weights
from etr.train.step import take_step

MEASURED_AT = ("none", "1.1", "0.6")
"""Capacity factors at which losses are measured; none drops nothing."""


@dataclass(frozen=True, kw_only=True)
class RecoverConfig:
    """How the new router is taught, and on what."""

    data: DataConfig = field(default_factory=DataConfig)
    """Text; losses are measured on its held-out part. The tokenizer is the model's own."""
    capacity: str = "factor"
    """Policy of the new layers, which the thresholds of the saved model imitate."""
    steps: int = 100
    """Steps in which the new router learns the old one's choices; experts stay as they are."""
    learning_rate: float = 3e-3
    """Learning rate of these steps."""
    into_fixed: int = 0
    """After them, steps in which the directions turn to the fixed frame while the whole model
    trains, and as many of a copy whose directions stay, to compare with. 0: they stay learned."""
    into_fixed_learning_rate: float = 1e-3
    """Peak learning rate of these steps."""
    calibration_batches: int = 16
    """Batches to fit temperatures and thresholds on."""
    eval_tokens_per_domain: int = 8192
    """Held-out tokens of each domain."""

    def __post_init__(self) -> None:
        for name in ("steps", "into_fixed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")
        for name in ("learning_rate", "into_fixed_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be > 0")
        for name in ("calibration_batches", "eval_tokens_per_domain"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        parse_capacity(self.capacity)

    @property
    def total_steps(self) -> int:
        """Steps of all kinds, those of the copy too."""
        return self.steps + 2 * self.into_fixed


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The model after one step of the way."""

    name: str
    """Name: before, swapped, calibrated or recovered; after training on, trained (directions as
    they were) or fixed."""
    losses: dict[str, float | None]
    """Held-out nats per token by capacity, see `MEASURED_AT`; None where thresholds would be
    needed and are not calibrated yet."""
    changed_tokens: float
    """Share of (token, layer) pairs whose set of experts is not the old router's."""


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a recovery did."""

    stages: tuple[Stage, ...]
    """Stages in order."""
    distillation: tuple[float, ...]
    """Divergence of new from old gates at each step, nats, mean over layers."""
    training: tuple[float, ...]
    """Cross-entropy at each step on the way to the fixed frame, nats per token."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return dataclasses.asdict(self)


def recover(
    model: EtrForCausalLM,
    data: OpenedData,
    config: RecoverConfig,
    on_step: Callable[[int, str], None] = lambda step, words: None,
) -> Recovery:
    """Swap the linear routers of `model` for ETR ones and teach them the old choices, in place.

    With `into_fixed`, then train on into the fixed frame; a copy of the model is held meanwhile.

    Args:
        model: with routers `token_choice` (see `convert`); ends calibrated, in eval mode, with
            float32 weights.
        data: text.
        config: how.
        on_step: called with each step's number, of `config.total_steps`, and its loss in words.
    Raises:
        ValueError: another router, too little text, or no fixed frame at this width.
        TrainingDiverged: the loss became NaN or infinite on the way to the fixed frame.
    """
    if config.into_fixed:
        check_blocks(model)
    widen_weights(model)
    old = [_weight(layer.router).clone() for layer in moe_layers(model)]
    loader = TokenLoader(
        data.dataset,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
    )
    sample = list(islice(loader, config.calibration_batches))
    measure = _Measure(data, config, old, sample)
    stages = [measure("before", model)]
    report = swap_router(model, map(_arguments, sample), capacity=config.capacity, fit=False)
    stages.append(measure("swapped", model, thresholds=False))
    set_temperatures(model, report)
    stages.append(measure("calibrated", model))
    losses = distill(
        model,
        old,
        islice(loader, config.steps),
        config.learning_rate,
        lambda step, loss: on_step(step, f"distillation {loss:.3f}"),
    )
    stages.append(measure("recovered", model))
    training: list[float] = []
    if config.into_fixed:
        for rows, order in zip(old, number_experts(model), strict=True):
            rows.copy_(rows[order])
        more, training = into_fixed(
            model,
            list(islice(loader, config.into_fixed)),
            OptimizerConfig(learning_rate=config.into_fixed_learning_rate),
            measure,
            lambda step, words: on_step(config.steps + step, words),
        )
        stages += more
    calibrate(model, sample)
    set_eval_selection(model, "threshold")
    model.eval()
    return Recovery(stages=tuple(stages), distillation=tuple(losses), training=tuple(training))


def distill(
    model: EtrForCausalLM,
    old: list[Tensor],
    batches: Iterable[Batch],
    learning_rate: float,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train the routers alone to choose as linear routers with weights `old` would.

    The loss of a layer is the divergence of the new router's distribution over all experts from
    the old one's. (Over the chosen experts alone it sharpens the router and moves more choices than
    it brings back.) Nothing is dropped on the way, and no gradient leaves a layer.

    Args:
        model: its routers are trained in place, and nothing else.
        old: weight [E, H] of each layer's old router.
        batches: text, one a step.
        learning_rate: of AdamW.
        on_step: called with each step's number and loss.
    Returns:
        The loss of each step, mean over layers.
    """
    widen_weights(model)
    routers = [p for layer in moe_layers(model) for p in layer.router.parameters()]
    optimizer = torch.optim.AdamW(routers, lr=learning_rate, weight_decay=0.0)
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    found: list[float] = []

    @torch.enable_grad()
    def see(place: int, view: LayerView) -> None:
        losses.append(choice_loss(view, old[place]))

    def backward(batch: Batch) -> float:
        losses.clear()
        with torch.no_grad():
            model(**_arguments(batch.to(device)))
        loss = torch.stack(losses).mean()
        loss.backward()
        return float(loss.detach())

    with selecting(model, "dropless"), watch(model, see):
        for step, batch in enumerate(batches):
            found.append(take_step(optimizer, partial(backward, batch)))
            on_step(step + 1, found[-1])
    optimizer.zero_grad()
    return found


def choice_loss(view: LayerView, old: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a layer's new distribution over experts from the old one's.

    Args:
        view: what the layer saw; its router is asked again, so that the gradient ends there.
        old: weight [E, H] of the old router.
    Returns:
        scalar, nats; mean over valid tokens.
    """
    x = view.x[view.routing.valid_mask]
    inputs: Any = None  # ETR's scores depend on the token alone
    assert isinstance(view.layer, MoE)
    new = view.layer.router.scores(x, inputs).logits
    assert new is not None
    wanted = (router_dtype(x) @ router_dtype(old).T).log_softmax(-1)
    return F.kl_div(new.log_softmax(-1), wanted, reduction="batchmean", log_target=True)


def _chosen(logits: Tensor, view: LayerView) -> Tensor:
    """The experts of the best logits, bool [T, E]."""
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    return chosen.scatter_(1, top_experts(logits, view.routing.top_k), True)


class _Measure:
    """Measures the stages of one recovery on the same text."""

    def __init__(
        self,
        data: OpenedData,
        config: RecoverConfig,
        old: list[Tensor],
        sample: list[Batch],
    ) -> None:
        self._data, self._config = data, config
        self._old, self._sample = old, sample

    def __call__(self, name: str, model: EtrForCausalLM, *, thresholds: bool = True) -> Stage:
        losses: dict[str, float | None] = {"none": self._loss(model, "dropless")}
        for factor in MEASURED_AT[1:]:
            losses[factor] = None
            if thresholds:
                policy = f"factor:capacity_factor={factor}"
                with reconfigured(model, capacity=policy, rank_by="score"):
                    calibrate(model, self._sample)
                    losses[factor] = self._loss(model, "threshold")
        return Stage(name=name, losses=losses, changed_tokens=self._changed(model))

    def _loss(self, model: EtrForCausalLM, selection: Any) -> float:
        data, config = self._data, self._config
        batches = held_out_batches(
            data.dataset,
            config.data.sequence_length,
            config.data.batch_size,
            config.eval_tokens_per_domain,
        )
        return evaluate(model, batches, data.dataset.domains, selection).loss

    @torch.no_grad()
    def _changed(self, model: EtrForCausalLM) -> float:
        """On the hidden states that the model has now."""
        changed = count = 0

        def see(place: int, view: LayerView) -> None:
            nonlocal changed, count
            logits = router_dtype(view.x) @ router_dtype(self._old[place]).T
            valid = view.routing.valid_mask
            differs = (view.routing.routing_map() != _chosen(logits, view)).any(-1)
            changed += int(differs[valid].sum())
            count += int(valid.sum())

        with selecting(model, "dropless"), watch(model, see):
            for batch in self._sample:
                model(**_arguments(batch.to(next(model.parameters()).device)))
        return changed / count


def _weight(router: Any) -> Tensor:
    if not isinstance(router, LinearRouter):
        raise ValueError(
            f"router {router.config.name!r} is not linear: there are no old choices to recover; "
            "start from the folder that `etr convert --router keep` writes"
        )
    return router.weight.detach()


def _arguments(batch: Batch) -> dict[str, Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.valid_mask.long()}
