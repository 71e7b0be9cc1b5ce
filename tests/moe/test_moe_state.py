"""State outside the gradient survives conversion, copies, checkpoints and meta starts."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from etr.moe import (
    CAPACITIES,
    ROUTERS,
    Collector,
    EtrRouter,
    ExpertParallel,
    MoE,
    MoEConfig,
    RoutingContext,
    Topology,
    after_step,
    attach,
    reset_states,
    support_table,
)
from etr.moe.state import GlobalState

H, E = 16, 4
CELLS = [cell for cell, reason in support_table().items() if reason is None]


def make(router: str | EtrRouter = "etr", capacity: str = "schedule") -> MoE:
    return MoE(
        MoEConfig(
            hidden_size=H, intermediate_size=4, num_experts=E, router=router, capacity=capacity
        )
    )


def step(layer: MoE, optimizer: Any = None, num_tokens: int = 60) -> Tensor:
    context = RoutingContext(token_ids=torch.randint(0, 50, (num_tokens,)))
    with Collector(layer) as collector:
        x = torch.randn(num_tokens, H, dtype=layer.experts.down_proj.dtype)
        y = layer(x, context).hidden_states
    loss = y.square().mean() + collector.loss()
    if optimizer is not None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after_step(layer)
    return loss.detach()


def states(layer: nn.Module) -> dict[str, Tensor]:
    found = {}
    for prefix, module in layer.named_modules():
        if isinstance(module, GlobalState):
            found |= {f"{prefix}.{n}": b for n, b in module.named_buffers(recurse=False)}
    return found


def assert_states_equal(got: nn.Module, want: nn.Module) -> None:
    a, b = states(got), states(want)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0, equal_nan=True, msg=name)


CONVERSIONS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "there and back": lambda m: m.half().float(),
    "deepcopy": copy.deepcopy,
    "eval": lambda m: m.eval(),
}


@pytest.mark.parametrize("conversion", list(CONVERSIONS))
@pytest.mark.parametrize("cell", CELLS)
def test_conversions_keep_the_state_bit_for_bit(cell: tuple[str, str], conversion: str) -> None:
    layer = make(*cell)
    for _ in range(2):
        step(layer)
    want = copy.deepcopy(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = CONVERSIONS[conversion](layer)
    assert_states_equal(got, want)
    if conversion in ("half", "bfloat16"):
        assert got.experts.down_proj.dtype != torch.float32
    for name, value in states(got).items():
        assert value.dtype in (torch.float32, torch.int64), name


def test_a_converted_layer_still_learns() -> None:
    layer = make().to(torch.bfloat16)
    step(layer)
    assert layer.calibration.is_calibrated
    assert layer.calibration.threshold.dtype == torch.float32


@pytest.mark.parametrize("cell", CELLS)
def test_a_meta_start_never_holds_uninitialised_memory(
    cell: tuple[str, str], nan_filled_memory: None
) -> None:
    with torch.device("meta"):
        layer = make(*cell)
    for name, value in states(layer).items():
        assert value.is_meta, name
    assert_states_equal(layer.to_empty(device="cpu"), make(*cell))
    assert not layer.calibration.is_calibrated
    moved = make(*cell)
    step(moved)
    assert_states_equal(moved.to("meta").to_empty(device="cpu"), make(*cell))


def test_reset_states() -> None:
    layer = make()
    step(layer)
    assert layer.calibration.is_calibrated
    reset_states(nn.Sequential(layer))
    assert_states_equal(layer, make())
    assert not layer.calibration.is_calibrated


@pytest.mark.parametrize("cell", CELLS)
def test_training_goes_on_identically_after_a_checkpoint(cell: tuple[str, str]) -> None:
    def optimizer_of(layer: MoE) -> torch.optim.Optimizer:
        return torch.optim.AdamW(layer.parameters(), lr=0.01)

    layer = make(*cell)
    optimizer = optimizer_of(layer)
    attachment = attach(layer, optimizer, total_steps=10)
    for _ in range(3):
        step_attached(layer, optimizer)
    file = io.BytesIO()
    torch.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    torch.manual_seed(7)
    want = [step_attached(layer, optimizer) for _ in range(4)]
    attachment.detach()

    torch.manual_seed(99)
    other = make(*cell)
    other_optimizer = optimizer_of(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    attach(other, other_optimizer, total_steps=10)
    torch.manual_seed(7)
    got = [step_attached(other, other_optimizer) for _ in range(4)]
    assert got == want
    assert_states_equal(other, layer)


def step_attached(layer: MoE, optimizer: torch.optim.Optimizer) -> float:
    context = RoutingContext(token_ids=torch.randint(0, 50, (60,)))
    output = layer(torch.randn(60, H), context)
    loss = output.hidden_states.square().mean() + sum(output.losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("cell", CELLS)
def test_a_checkpoint_without_state_warns_and_starts_afresh(cell: tuple[str, str]) -> None:
    trained, fresh = make(*cell), make(*cell)
    step(trained)
    weights = {name: p for name, p in trained.state_dict().items() if name not in states(trained)}
    step(fresh)
    with pytest.warns(UserWarning, match="no routing state"):
        fresh.load_state_dict(weights)
    assert_states_equal(fresh, make(*cell))
    assert not fresh.calibration.is_calibrated
    assert torch.equal(fresh.experts.down_proj, trained.experts.down_proj)


def test_a_checkpoint_with_part_of_the_state_keeps_that_part() -> None:
    trained, fresh = make(), make()
    step(trained)
    weights = trained.state_dict()
    del weights["calibration.histogram"]
    with pytest.warns(UserWarning, match="histogram"):
        fresh.load_state_dict(weights)
    assert torch.equal(fresh.calibration.threshold, trained.calibration.threshold)
    assert not fresh.calibration.histogram.any()


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_without_the_layers_weights_leaves_its_state(nested: bool) -> None:
    """As when an adapter's weights are loaded."""
    trained = make()
    step(trained)
    same = copy.deepcopy(trained)
    model = torch.nn.ModuleDict({"moe": trained}) if nested else trained
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict({}, strict=False)
    assert trained.calibration.is_calibrated
    assert_states_equal(trained, same)


@pytest.mark.parametrize("assign", [False, True])
def test_a_half_precision_checkpoint_leaves_the_state_in_float32(assign: bool) -> None:
    trained, fresh = make(), make()
    step(trained)
    weights = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in trained.state_dict().items()
    }
    fresh.load_state_dict(weights, assign=assign)
    for name, value in states(fresh).items():
        assert value.dtype in (torch.float32, torch.int64), name
    assert fresh.calibration.is_calibrated


def test_loading_mirrors_the_state_on_the_host() -> None:
    trained = make()
    step(trained)
    trained.capacity.set_progress(0.5)
    fresh = make()
    fresh.load_state_dict(trained.state_dict())
    assert fresh.calibration.is_calibrated
    assert fresh.capacity.stage == trained.capacity.stage > 0
    unlike = make()
    trained.load_state_dict(unlike.state_dict())
    assert not trained.calibration.is_calibrated
    assert trained.capacity.stage == 0


def test_a_value_on_another_device_is_read_only_after_a_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading waits for a GPU, so it goes by what a tensor's version and place tell."""
    monkeypatch.setattr("etr.moe.state._trace", lambda value: (value.data_ptr(), value._version))
    reads: list[float] = []

    class Counted(GlobalState):
        def __init__(self) -> None:
            super().__init__()
            self.register_state("progress", (), 0.0, read=self.seen)

        def seen(self, value: float) -> float:
            reads.append(value)
            return value

    state = Counted()
    reads.clear()
    assert [state.on_host("progress") for _ in range(3)] == [0.0] * 3
    state.progress.fill_(0.25)
    state.set_on_host("progress", 0.25)  # the writer knows
    assert state.on_host("progress") == 0.25
    assert reads == []
    state.state_dict()["progress"].copy_(torch.tensor(0.5))
    assert [state.on_host("progress") for _ in range(3)] == [0.5] * 3
    state.progress = torch.tensor(0.75)
    assert [state.on_host("progress") for _ in range(3)] == [0.75] * 3
    state.progress.data.fill_(1.0)
    state.eval()
    assert [state.on_host("progress") for _ in range(3)] == [1.0] * 3
    assert reads == [0.5, 0.75, 1.0]


def test_buffers_assigned_by_a_loader_are_seen_when_the_mode_is_set() -> None:
    layer = make()
    layer.calibration.num_updates = torch.tensor(3)
    layer.eval()
    assert layer.calibration.is_calibrated


@pytest.mark.parametrize("assign", [False, True])
def test_single_numbers_without_dimension_are_read(assign: bool) -> None:
    """As earlier checkpoints have them."""
    saved, loaded = make(EtrRouter(gate="sigmoid")), make(EtrRouter(gate="sigmoid"))
    for number in (saved.router.log_temperature, saved.router.offset):
        torch.nn.init.normal_(number)
    earlier = {n: x.reshape(()) if x.shape == (1,) else x for n, x in saved.state_dict().items()}
    assert earlier["router.offset"].dim() == earlier["router.log_temperature"].dim() == 0
    loaded.load_state_dict(earlier, assign=assign)
    for (name, got), want in zip(loaded.named_parameters(), saved.parameters(), strict=True):
        assert got.shape == want.shape, name
        assert torch.equal(got, want), name


def through_a_file(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIERS: dict[str, Any] = {
    "deepcopy": copy.deepcopy,
    "save": through_a_file,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "average": lambda module: torch.optim.swa_utils.AveragedModel(module).module,
}


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("copier", COPIERS)
def test_a_layer_can_be_copied_between_a_forward_and_its_backward(
    copier: str, attached: bool
) -> None:
    layer = make("token_choice", "factor")
    if attached:
        attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1), total_steps=10)
    x = torch.randn(8, H)
    with Collector(layer) as collector:
        y = layer(x).hidden_states
    other = COPIERS[copier](layer)
    assert other.collector is None
    (y.sum() + collector.loss()).backward()
    torch.testing.assert_close(other(x).hidden_states, y)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[Any]:
    """A process group of this process alone; it can be neither copied nor saved."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("copier", COPIERS)
def test_a_copy_of_an_attached_model_is_attached_to_nothing(copier: str, one_rank: Any) -> None:
    model = nn.Sequential(nn.Linear(H, H), make(capacity="schedule"))
    model[1].register_forward_hook(hidden_states)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attachment = attach(model, optimizer, total_steps=4, group=one_rank)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            model(torch.randn(20, H)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(model, optimizer)
    other = COPIERS[copier](model)
    assert_states_equal(other, model)
    before = copy.deepcopy(other.state_dict())
    train(model, optimizer)  # steps of the original are none of the copy's
    other(torch.randn(20, H)).sum().backward()
    assert int(model[1].state.step) == 4
    for name, value in other.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert other[1].pending == {}
    assert other[1].attachment is None
    assert model[1].attachment is attachment

    its = torch.optim.AdamW(other.parameters(), lr=0.01)
    attach(other, its, total_steps=4)
    train(other, its)
    assert int(other[1].state.step) == 4
    assert other[1].capacity.stage == model[1].capacity.stage == 15


def hidden_states(module: nn.Module, args: Any, output: Any) -> Tensor:
    return output.hidden_states


def test_a_copy_of_a_distributed_layer_works_with_the_same_ranks(one_rank: Any) -> None:
    layer = make()
    mesh = init_device_mesh("cpu", (1,))
    layer.distribute(ExpertParallel.create(mesh, Topology(node_of_rank=(0,)), E))
    other = copy.deepcopy(layer)
    assert other.parallel is layer.parallel
    x = torch.randn(20, H)
    assert torch.equal(other(x).hidden_states, layer(x).hidden_states)


def test_every_policy_and_router_is_covered() -> None:
    assert {r for r, _ in CELLS} == set(ROUTERS)
    assert {c for _, c in CELLS} == set(CAPACITIES)
