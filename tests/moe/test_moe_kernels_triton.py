"""Triton kernels in the interpreter, against the loop. Needs the package triton.

Triton decides at its first import whether it interprets, so one test runs this file again in a
process that does. Compiled kernels are tested in test_moe_kernels_compile.py and in tests/gpu.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_moe_experts_gradients import H, I, T, gradients, leaves_of, params_of, routed

from etr.moe import EXPERT_BACKENDS
from etr.moe.affinity import grap_affinity, learned_block_affinity
from etr.moe.dispatch import Permute
from etr.moe.experts import ACTIVATIONS, ExpertParams
from etr.moe.select import top_experts

pytest.importorskip("triton", reason="the package triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_this_file_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "--show-capture=no"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def run(
    name: str, x: torch.Tensor, chosen: tuple[Any, Any], params: ExpertParams
) -> list[torch.Tensor]:
    y = Permute().run(x, *chosen, EXPERT_BACKENDS[name], params)
    torch.manual_seed(7)
    upstream = torch.randn(x.shape).to(x.dtype)
    found = gradients(y, upstream, x, chosen[0].gate, *leaves_of(params))
    return [y.detach(), *found]


@interpreted
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_kernels_equal_the_loop(
    bias: bool, activation: str, capacity: int | None, dtype: torch.dtype
) -> None:
    x = torch.randn(T, H).to(dtype).requires_grad_()
    params, chosen = params_of(activation, dtype, bias=bias), routed(2, capacity)
    limit = TOLERANCE[dtype]
    if activation == "clamped_swiglu" and dtype == torch.bfloat16:
        # The interpreter cuts a float32 to bfloat16 where devices round it, and the clamp's slope
        # jumps: where a product is exact in both, none lies on the other side of the limit.
        with torch.no_grad():
            x.round_().clamp_(-2, 2)
            for weight in (params.up, *([params.up_bias] if params.up_bias is not None else [])):
                weight.mul_(4).round_().clamp_(-2, 2).div_(4)
    for got, want in zip(
        run("triton", x, chosen, params), run("loop", x, chosen, params), strict=True
    ):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, atol=4 * limit, rtol=limit)


@interpreted
@pytest.mark.usefixtures("nan_filled_memory")
def test_several_tiles_and_ragged_edges() -> None:
    """More rows than a tile, widths that are no multiple of one, an expert with none."""
    hidden_size, width, num_tokens = 40, 24, 60
    params = ExpertParams(
        up=torch.randn(4, 2 * width, hidden_size).div(6).requires_grad_(),
        down=torch.randn(4, hidden_size, width).div(5).requires_grad_(),
        activation="swiglu",
    )
    x = torch.randn(num_tokens, hidden_size, requires_grad=True)
    chosen = routed(3, None, num_tokens)
    got, want = run("triton", x, chosen, params), run("loop", x, chosen, params)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-5)


@interpreted
@pytest.mark.usefixtures("nan_filled_memory")
def test_rows_in_rows_out() -> None:
    rows, counts = torch.randn(30, H, requires_grad=True), torch.tensor([17, 0, 5, 8])
    params, found = params_of("swiglu", torch.float32), []
    for name in ("triton", "loop"):
        out = EXPERT_BACKENDS[name].run(rows, counts, params)
        found.append([out, *gradients(out, torch.ones_like(out), rows, params.up, params.down)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@interpreted
def test_only_tokens_and_hidden_are_kept_and_nothing_without_gradients() -> None:
    x, kept = torch.randn(T, H, requires_grad=True), []
    params, chosen = params_of("swiglu", torch.float32), routed(2, None)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = Permute().run(x, *chosen, EXPERT_BACKENDS["triton"], params)
    rows = int(chosen[1].num_tokens_per_expert.sum())
    floats = {t.data_ptr(): t.numel() for t in kept if t.is_floating_point() and t.dim() > 1}
    assert sorted(floats.values()) == sorted(
        [x.numel(), rows * 2 * I, params.up.numel(), params.down.numel()]
    )
    with torch.no_grad():
        again = Permute().run(x, *chosen, EXPERT_BACKENDS["triton"], params)
    assert torch.equal(again, y)


@interpreted
@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frame", ["fixed", "learned"])
@pytest.mark.parametrize(
    ("hidden_size", "num_experts", "top_k"), [(24, 3, 1), (64, 8, 2), (32, 32, 5)]
)
def test_affinity_top_k_and_load_in_one_kernel(
    hidden_size: int, num_experts: int, top_k: int, frame: str, dtype: torch.dtype
) -> None:
    from etr.moe.kernels.triton_affinity import affinity_top_k

    x, mask = torch.randn(37, hidden_size).to(dtype), torch.rand(37) > 0.2
    x[5] = 0  # every expert ties
    weight = None if frame == "fixed" else torch.randn(hidden_size)
    found = affinity_top_k(x, num_experts, top_k, weight=weight, valid_mask=mask)
    if weight is None:
        want = grap_affinity(x, num_experts)
    else:
        want = learned_block_affinity(x, weight, num_experts)
    torch.testing.assert_close(found.affinity, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.norm, x.float().norm(dim=-1, keepdim=True).clamp_min(1e-12))
    assert torch.equal(found.expert, top_experts(found.affinity, top_k))
    assert found.expert[5].tolist() == list(range(top_k))
    load = found.expert[mask].flatten().bincount(minlength=num_experts)
    assert torch.equal(found.num_tokens_per_expert, load)
    none = affinity_top_k(x[:0], num_experts, top_k, weight=weight)
    assert none.expert.shape == (0, top_k)
    assert not none.num_tokens_per_expert.any()


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="Triton runs here")
def test_without_a_device_the_backend_says_why() -> None:
    assert "no CUDA device" in str(EXPERT_BACKENDS["triton"].unavailable())
    params, chosen = params_of("swiglu", torch.float32), routed()
    with pytest.raises(ValueError, match=r"backend='triton' cannot run: there is no CUDA device"):
        Permute().run(torch.randn(T, H), *chosen, EXPERT_BACKENDS["triton"], params)
