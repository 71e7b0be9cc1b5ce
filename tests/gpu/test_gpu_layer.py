"""The layer on a CUDA device: the same numbers as on the CPU, and no hidden waits."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

import etr
from etr.moe import EXPERT_BACKENDS, ROUTERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def make_layer(router: str, backend: str) -> etr.MoE:
    config = etr.MoEConfig(
        hidden_size=64,
        intermediate_size=32,
        num_experts=8,
        router=router,
        capacity=etr.capacity.Factor(capacity_factor=0.7),
        backend=backend,
    )
    return etr.MoE(config)


@pytest.fixture
def waits_are_errors() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("backend", EXPERT_BACKENDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_values_and_gradients_equal_the_cpu(router: str, backend: str) -> None:
    reason = EXPERT_BACKENDS[backend].unavailable()
    if reason is not None:
        pytest.skip(reason)
    here = make_layer(router, backend).double()
    there = copy.deepcopy(here).cuda()
    x = torch.randn(96, 64, dtype=torch.float64)
    ids = torch.randint(0, 100, (96,))
    found = []
    for layer, device in ((here, "cpu"), (there, "cuda")):
        leaf = x.to(device).requires_grad_()
        output = layer(leaf, etr.RoutingContext(token_ids=ids.to(device)))
        (output.hidden_states.square().sum() + sum(output.losses.values())).backward()
        found.append((output.hidden_states.cpu(), leaf.grad.cpu(), output.stats))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-9)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-9)
    for name, value in found[0][2].items():
        assert torch.equal(value, found[1][2][name].cpu()), name


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "hash"])
def test_the_padded_path_never_waits_for_the_device(router: str, waits_are_errors: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    layer = make_layer(router, "bmm").cuda()
    x = torch.randn(96, 64, device="cuda", requires_grad=True)
    layer(x).hidden_states.sum().backward()  # first-use set-up may wait
    torch.cuda.set_sync_debug_mode("error")
    output = layer(x)
    (output.hidden_states.sum() + sum(output.losses.values())).backward()


def test_the_padded_path_can_be_captured_in_a_graph() -> None:
    layer = make_layer("etr", "bmm").cuda()
    x = torch.randn(96, 64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = layer(x).hidden_states
    x.copy_(torch.randn_like(x))
    graph.replay()
    with torch.no_grad():
        assert torch.allclose(captured, layer(x).hidden_states, atol=1e-6)
