"""attach, after_step and set_progress."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from etr.moe import Collector, MoE, MoEConfig, after_step, attach, set_progress
from etr.moe.capacity import CapacityConfig, NoLimit, Schedule

H = 16


class Model(nn.Module):
    def __init__(self, capacity: CapacityConfig | None = None, router: str = "etr") -> None:
        super().__init__()
        self.proj = nn.Linear(H, H)
        config = MoEConfig(
            hidden_size=H,
            intermediate_size=4,
            num_experts=4,
            router=router,
            capacity=capacity or Schedule(),
        )
        self.moe = MoE(config)
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.moe(self.proj(x)).hidden_states
        if self.fail:
            raise RuntimeError("halfway")
        return y


def train(model: Model, optimizer: torch.optim.Optimizer, num_steps: int = 1) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.randn(8, H)).square().mean().backward()
        optimizer.step()


def attached(total_steps: int | None = 10, **options: Schedule) -> tuple:
    model = Model(**options)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, attach(model, optimizer, total_steps)


def test_each_optimizer_step_is_a_step_of_the_schedule() -> None:
    model, optimizer, attachment = attached(10)
    for done in range(1, 13):
        train(model, optimizer)
        assert int(model.moe.state.step) == done
        assert float(model.moe.capacity.progress) == pytest.approx(min(1.0, done / 10))
        assert int(attachment.last_stats[0]["num_valid_tokens"]) == 8
    assert model.moe.capacity.stage == 15
    assert model.moe.calibration.is_calibrated


def test_micro_batches_of_one_step_count_as_one() -> None:
    model, optimizer, attachment = attached(10)
    for _ in range(3):
        model(torch.randn(8, H)).sum().backward()
    optimizer.step()
    assert int(model.moe.state.step) == 1
    assert int(attachment.last_stats[0]["num_valid_tokens"]) == 24
    assert int(attachment.last_stats[0]["num_forwards"]) == 3


def test_evaluation_between_steps_is_not_counted() -> None:
    model, optimizer, attachment = attached(10)
    train(model, optimizer)
    model.eval()
    with torch.no_grad():
        model(torch.randn(100, H))
    model.train()
    train(model, optimizer)
    assert int(attachment.last_stats[0]["num_valid_tokens"]) == 8


def test_a_collector_of_ones_own_still_gets_the_losses() -> None:
    model, optimizer, attachment = attached(10)
    with Collector(model) as collector:
        y = model(torch.randn(8, H))
    loss = collector.loss()
    assert isinstance(loss, Tensor)
    assert loss.requires_grad
    (y.sum() + loss).backward()
    optimizer.step()
    assert int(attachment.last_stats[0]["num_valid_tokens"]) == 8


def test_detach() -> None:
    model, optimizer, attachment = attached(10)
    train(model, optimizer)
    attachment.detach()
    with pytest.warns(UserWarning, match="learn neither thresholds"):
        train(model, optimizer, 3)
    assert int(model.moe.state.step) == 1
    assert model.moe.pending == {}
    assert model.moe.collector is None


def test_a_forward_that_raises_counts_nothing() -> None:
    model, optimizer, attachment = attached(10)
    model.fail = True
    with pytest.raises(RuntimeError, match="halfway"):
        model(torch.randn(8, H))
    assert model.moe.pending == {}
    model.fail = False
    train(model, optimizer)
    assert int(attachment.last_stats[0]["num_valid_tokens"]) == 8


def test_resumed_training_goes_on_from_the_stored_step() -> None:
    model, optimizer, _ = attached(10)
    train(model, optimizer, 4)
    other = Model()
    other.load_state_dict(model.state_dict())
    again = torch.optim.SGD(other.parameters(), lr=0.1)
    attach(other, again, 10)
    assert float(other.moe.capacity.progress) == pytest.approx(0.4)
    assert other.moe.capacity.stage == model.moe.capacity.stage > 0
    train(other, again)
    assert int(other.moe.state.step) == 5
    assert float(other.moe.capacity.progress) == pytest.approx(0.5)


@pytest.mark.parametrize("attach_first", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, torch.optim.SGD])
def test_moments_without_dimension_go_on(kind: Any, attach_first: bool) -> None:
    """As earlier checkpoints have them, of numbers that had no dimension either."""

    def optimizer_of(model: Model) -> torch.optim.Optimizer:
        momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return kind(model.parameters(), lr=0.01, **momentum)

    model = Model()
    optimizer = optimizer_of(model)
    attach(model, optimizer, 10)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state |= {
            name: x.reshape(())
            for name, x in state.items()
            if isinstance(x, Tensor) and x.shape == (1,)
        }
    other = Model()
    other.load_state_dict(model.state_dict())
    again = optimizer_of(other)
    if attach_first:
        attach(other, again, 10)
    again.load_state_dict(saved)
    if not attach_first:
        attach(other, again, 10)
    for one, its in ((model, optimizer), (other, again)):
        torch.manual_seed(4)
        train(one, its, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_capacity_falls_as_training_goes_on() -> None:
    model, optimizer, attachment = attached(20)
    seen = []
    for _ in range(20):
        train(model, optimizer)
        seen.append(int(attachment.last_stats[0]["capacity_sum"]) // 4)
    assert seen[0] == math.ceil(1.1 * 8 / 4)
    assert seen[-1] == math.ceil(0.6 * 8 / 4)
    assert seen == sorted(seen, reverse=True)


def test_a_schedule_without_progress_warns_exactly_once() -> None:
    model, optimizer, _ = attached(None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 230)
    about = [w for w in caught if "without set_progress" in str(w.message)]
    assert len(about) == 1
    assert "etr.attach(model, optimizer, total_steps)" in str(about[0].message)


@pytest.mark.parametrize("steps", [None, 5])
def test_no_warning_where_progress_is_known(steps: int | None) -> None:
    capacity = Schedule(steps=steps)
    model, optimizer, _ = attached(300 if steps is None else None, capacity=capacity)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 120)
    assert float(model.moe.capacity.progress) > 0.39


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan, math.inf])
def test_progress_out_of_range(progress: float) -> None:
    with pytest.raises(ValueError, match=rf"progress={progress} must lie in \[0, 1\]"):
        set_progress(Model(), progress)


def test_attach_refuses_what_it_cannot_serve() -> None:
    plain = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear holds no MoE layer"):
        attach(plain, torch.optim.SGD(plain.parameters()), 10)
    model = Model()
    with pytest.raises(ValueError, match="total_steps=0"):
        attach(model, torch.optim.SGD(model.parameters()), 0)


def test_after_step_stores_the_load() -> None:
    model = Model()
    with Collector(model):
        model(torch.randn(50, H))
    stats = after_step(model)[0]
    assert torch.equal(model.moe.state.previous_load, stats["num_choices_per_expert"].float())
    assert after_step(model) == [{}]
    assert model.moe.state.previous_load.sum() == 50
    assert int(model.moe.state.step) == 1


def told(run: Callable[[], None], about: str = "learn neither thresholds") -> int:
    """How many warnings say so while it runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return sum(about in str(w.message) and "etr.attach(" in str(w.message) for w in caught)


@pytest.mark.parametrize("fused", [False, True])
def test_training_without_attach_is_said_once(fused: bool) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    assert told(lambda: train(model, optimizer, 2)) == 0  # a step may still be told
    assert told(lambda: train(model, optimizer, 10)) == 1
    assert told(lambda: train(model, optimizer, 120)) == 0


def test_layers_that_are_collected_from_say_it_together() -> None:
    model = nn.Sequential(Model(), Model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for _ in range(5):
            with Collector(model) as collector:
                y = model(torch.randn(8, H))
            (y.sum() + collector.loss()).backward()
            optimizer.step()

    assert told(run) == 1


def test_frozen_layers_say_it_after_many_forwards() -> None:
    """Their weights do not tell of steps, as those of a layer with an adapter."""
    model = Model()
    model.moe.requires_grad_(False)
    optimizer = torch.optim.SGD(model.proj.parameters(), lr=0.1)
    assert told(lambda: train(model, optimizer, 99)) == 0
    assert told(lambda: train(model, optimizer, 99)) == 1


class Recomputed(Model):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


@pytest.mark.parametrize("kind", [Model, Recomputed])
@pytest.mark.parametrize("how", ["attach", "after_step"])
def test_nothing_is_said_where_steps_are_told(how: str, kind: type[Model]) -> None:
    """However many micro-batches a step has."""
    model = kind()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        if how == "attach":
            attach(model, optimizer, 10)
        for count in (105, 1, 1) if how == "attach" else (20, 20, 20):
            for _ in range(count):
                with Collector(model):
                    y = model(torch.randn(8, H))
                y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if how == "after_step":
                after_step(model)
                set_progress(model, 0.5)

    assert told(run) == 0


def test_nothing_is_said_where_no_step_is_due() -> None:
    model = Model()
    with torch.no_grad():
        assert told(lambda: [model(torch.randn(8, H)) for _ in range(200)]) == 0
    model.eval()
    assert told(lambda: [model(torch.randn(8, H)) for _ in range(200)]) == 0
    plain = Model(router="token_choice", capacity=NoLimit())  # learns nothing beside its weights
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    assert told(lambda: train(plain, optimizer, 120)) == 0


def test_an_optimizer_of_another_model_is_said() -> None:
    model, other = Model(), Model()
    with pytest.warns(UserWarning, match="optimizer holds no parameter of Model"):
        attach(model, torch.optim.SGD(other.parameters(), lr=0.1), 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, torch.optim.SGD([model.proj.bias], lr=0.1), 10)
