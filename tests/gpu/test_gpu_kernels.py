"""Hand-written kernels on a CUDA device: the same numbers as torch's own operations."""

from __future__ import annotations

import pytest
import torch

import etr
from etr.moe import EXPERT_BACKENDS
from etr.moe.affinity import grap_affinity, learned_block_affinity
from etr.moe.dispatch import Permute
from etr.moe.select import top_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def make_layer(backend: str, dtype: torch.dtype, top_k: int = 2) -> etr.MoE:
    config = etr.MoEConfig(
        hidden_size=192,
        intermediate_size=136,
        num_experts=8,
        top_k=top_k,
        router="etr",
        capacity=etr.capacity.Factor(capacity_factor=0.9),
        backend=backend,
    )
    return etr.MoE(config).to("cuda", dtype)


@pytest.mark.parametrize("num_tokens", [5, 700, 4096])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["triton", "sonic", "grouped_mm", "bmm"])
def test_backends_equal_the_loop(name: str, dtype: torch.dtype, num_tokens: int) -> None:
    reason = EXPERT_BACKENDS[name].unavailable()
    if reason is not None:
        pytest.skip(reason)
    layer, found = make_layer("loop", dtype), []
    data = torch.randn(num_tokens, 192, device="cuda", dtype=dtype)
    upstream = torch.randn_like(data)
    with torch.no_grad():
        routing, limit = layer.route(data, etr.RoutingContext())
        selection = layer.keep(routing, limit).selection
    for backend in ("loop", name):
        x, params = data.clone().requires_grad_(), layer.experts.params(dtype)
        y = Permute().run(x, routing, selection, EXPERT_BACKENDS[backend], params)
        found.append([y, *torch.autograd.grad(y, (x, params.up, params.down), upstream)])
    for want, got in zip(*found, strict=True):
        error = (want.float() - got.float()).norm() / want.float().norm().clamp_min(1e-12)
        assert float(error) < TOLERANCE[dtype]


def test_the_triton_engine_never_waits_for_the_device() -> None:
    reason = EXPERT_BACKENDS["triton"].unavailable()
    if reason is not None:
        pytest.skip(reason)
    layer = make_layer("triton", torch.bfloat16)
    x = torch.randn(512, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    routing, limit = layer.route(x, etr.RoutingContext())
    handle = Permute().plan(routing, layer.keep(routing, limit).selection, padded=False)
    before = torch.cuda.get_sync_debug_mode()
    try:
        for mode in ("default", "error"):  # first-use compilation may wait
            torch.cuda.set_sync_debug_mode(mode)
            params = layer.experts.params(x.dtype)
            EXPERT_BACKENDS["triton"].run_routed(x, handle, params).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frame", ["fixed", "learned"])
def test_block_affinity_equals_the_cpu(frame: str, dtype: torch.dtype) -> None:
    x, weight = torch.randn(300, 256).to(dtype), torch.randn(256)
    found = []
    for device in ("cpu", "cuda"):
        leaf, vector = x.to(device).requires_grad_(), weight.to(device).requires_grad_()
        if frame == "fixed":
            affinity = grap_affinity(leaf, 8)
        else:
            affinity = learned_block_affinity(leaf, vector, 8)
        affinity.square().sum().backward()
        assert leaf.grad is not None
        found.append((affinity.detach().cpu(), leaf.grad.float().cpu()))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (64, 8), (256, 8)])
def test_affinity_top_k_and_load_in_one_kernel(
    num_experts: int, top_k: int, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    from etr.moe.kernels.triton_affinity import affinity_top_k

    x = torch.randn(1000, 1024, device="cuda").to(dtype)
    found = affinity_top_k(x, num_experts, top_k)
    torch.testing.assert_close(found.affinity, grap_affinity(x, num_experts), atol=1e-6, rtol=0)
    assert torch.equal(found.expert, top_experts(found.affinity, top_k))
    load = found.expert.flatten().bincount(minlength=num_experts)
    assert torch.equal(found.num_tokens_per_expert, load)


def test_a_training_step_of_the_padded_path_can_be_captured_in_a_graph() -> None:
    layer = make_layer("bmm", torch.float32)
    x = torch.randn(96, 192, device="cuda", requires_grad=True)

    def step() -> torch.Tensor:
        output = layer(x)
        loss = output.hidden_states.square().sum() + sum(output.losses.values())
        return torch.autograd.grad(loss, (x, layer.experts.down_proj))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
