"""Activation checkpointing and torch.compile change nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cells import ALL, ROUTER_CELLS, Cell, H, T, context, ids, on_the_shelf, tokens
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from etr.moe import ROUTERS, Collector, LossConfig, MoE
from etr.moe.polar import newton_schulz


class Block(nn.Module):
    """A layer behind a linear map, optionally recomputed in the backward pass."""

    def __init__(self, layer: MoE, recompute: bool, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.proj = nn.Linear(layer.config.hidden_size, layer.config.hidden_size).double()
        self.layer, self.recompute, self.reentrant = layer, recompute, reentrant

    def forward(self, x: Tensor, **fields: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return self.layer(x, context(T, **fields)).hidden_states

        x = self.proj(x)
        return x + (checkpoint(run, x, use_reentrant=self.reentrant) if self.recompute else run(x))


def run_two_micro_batches(block: Block, batches: list[Tensor], token_ids: Tensor) -> list[Tensor]:
    block.zero_grad()
    block.layer.pending = {}
    found = []
    for x in batches:
        with Collector(block) as collector:
            y = block(x, token_ids=token_ids)
        loss = y.square().mean() + collector.loss()
        loss.backward()
        found += [y.detach(), loss.detach()]
    grads = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    return found + grads + [block.layer.pending[name] for name in sorted(block.layer.pending)]


@pytest.mark.parametrize("mode", ["ranks", "running", "previous"])
@pytest.mark.parametrize("cell", ROUTER_CELLS, ids=ids)
def test_checkpointing_changes_no_counter_value_or_gradient(cell: Cell, mode: str) -> None:
    layer = cell.layer(losses=LossConfig(aux_mode=mode))
    batches, token_ids = [tokens(), tokens()], torch.randint(0, 99, (T,))
    want = run_two_micro_batches(Block(layer, recompute=False), batches, token_ids)
    got = run_two_micro_batches(Block(layer, recompute=True), batches, token_ids)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_reentrant_checkpointing_is_refused() -> None:
    """It runs the forward without gradients, so the losses would silently be lost."""
    cell = next(c for c in ALL if c.router.name == "token_choice")
    block = Block(cell.layer(), recompute=True, reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=False"), Collector(block):
        block(tokens())


def _adds_nothing(cell: Cell) -> bool:
    """Whether other cells trace the same code: an option of the shelf, or of a preset.

    Methods of the shelf are made of operations that these cells trace. A preset builds the
    router of another row, with other defaults; that reads each option whatever the others are.
    """
    kind = type(cell.router)
    rows = [row for row in ROUTERS.values() if row is not kind]
    preset = any(issubclass(kind, row) and kind.build is row.build for row in rows)
    return (preset or on_the_shelf(kind)) and cell.router != kind()


COMPILED = [
    dataclasses.replace(cell, backend="bmm") for cell in ROUTER_CELLS if not _adds_nothing(cell)
]


def _traced_backward() -> set[str]:
    """Ids of the first cell with each option, and of each router alone.

    Other routers have the same options by the same code.
    """
    found: dict[str, str] = {}
    for cell in COMPILED:
        name, _, option = cell.id.partition("[")
        if not on_the_shelf(type(cell.router)):
            found.setdefault(option.partition("]")[0] or name, cell.id)
    return set(found.values())


TRACED_BACKWARD = _traced_backward()


@pytest.fixture
def iterated_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly too, iterate to orthonormal directions, as compiled code does on any device.

    tests/moe/test_moe_affinity.py compares the iteration with the closed form of the CPU.
    """
    monkeypatch.setattr(
        "etr.moe.routers.etr.polar_factor", lambda weight, _=None: newton_schulz(weight)
    )


@pytest.fixture
def few_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds each iteration; that all of them compile, inductor's test shows."""
    monkeypatch.setattr("etr.moe.polar.ITERATIONS", 2)


def assert_compiled_equals_eager(cell: Cell, backend: str, tolerance: float) -> None:
    torch._dynamo.reset()
    layer, ctx = cell.layer(torch.float32), context(valid_mask=torch.arange(T) < T - 2)

    def run(x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        output = layer(x, ctx)
        return output.hidden_states, output.losses, output.stats

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    results = []
    for function in (run, compiled):
        layer.zero_grad()
        torch.manual_seed(5)
        x = tokens(dtype=torch.float32).requires_grad_()
        y, losses, stats = function(x)
        (y.square().sum() + sum(losses.values())).backward()
        assert x.grad is not None
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([y, x.grad, *grads, *losses.values(), *stats.values()])
    for a, b in zip(*results, strict=True):
        largest = float(a.detach().abs().amax())  # sums over tokens cancel: float32 errors do not
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, largest))


@pytest.mark.usefixtures("iterated_directions", "few_iterations")
@pytest.mark.parametrize("cell", COMPILED, ids=ids)
def test_the_padded_path_compiles_as_one_graph(cell: Cell) -> None:
    backend = "aot_eager" if cell.id in TRACED_BACKWARD else "eager"
    assert_compiled_equals_eager(cell, backend, 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("iterated_directions")
def test_inductor_equals_eager() -> None:
    cell = next(c for c in COMPILED if c.router.name == "etr")
    assert_compiled_equals_eager(cell, "inductor", 1e-5)


def test_capacity_stages_recompile_and_nothing_else_does() -> None:
    """Progress within a stage reuses the compiled graph."""
    torch._dynamo.reset()
    from etr.moe import set_progress

    cell = next(c for c in COMPILED if c.router.name == "etr_paper")
    layer, ctx = cell.layer(torch.float32, capacity="schedule"), context()
    counter = CompileCounter()
    compiled = torch.compile(lambda x: layer(x, ctx).hidden_states, fullgraph=True, backend=counter)
    x = tokens(dtype=torch.float32)
    for progress in (0.0, 0.01, 0.05, 0.09):
        set_progress(layer, progress)
        assert torch.equal(compiled(x), layer(x, ctx).hidden_states)
    assert counter.frame_count == 1
    set_progress(layer, 1.0)
    assert torch.equal(compiled(x), layer(x, ctx).hidden_states)
    assert counter.frame_count == 2


@pytest.mark.usefixtures("few_iterations")
@pytest.mark.parametrize(
    ("router", "capacity"),
    [("etr", "schedule"), ("token_choice", "factor")],
)
def test_one_graph_serves_batches_of_any_length(router: str, capacity: str) -> None:
    torch._dynamo.reset()
    cell = next(c for c in COMPILED if c.router.name == router)
    layer, counter = cell.layer(torch.float32, capacity=capacity), CompileCounter()
    compiled = torch.compile(
        lambda x: layer(x).hidden_states, fullgraph=True, dynamic=True, backend=counter
    )
    lengths = (3 * T, 7, T + 1)  # the first is no other size, for which it would be taken
    assert [compiled(torch.randn(n, H)).shape[0] for n in lengths] == [*lengths]
    assert counter.frame_count == 1
