"""GrAP and its frames: the identities that the method promises."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from etr.moe import EtrRouter, MoE, MoEConfig, reference
from etr.moe.affinity import (
    cosine_affinity,
    grap_affinity,
    learned_block_affinity,
    product,
)
from etr.moe.polar import (
    _KNOWN,
    condition_number,
    known_factor,
    newton_schulz,
    orthonormal_start,
    polar_factor,
    polar_parts,
)

SIZES = [(8, 2), (16, 4), (16, 16), (64, 8), (12, 1)]


def affinity(frame: str, x: Tensor, num_experts: int) -> Tensor:
    hidden_size = x.shape[1]
    if frame == "fixed":
        return grap_affinity(x, num_experts)
    if frame == "learned":
        return learned_block_affinity(x, torch.randn(hidden_size).to(x), num_experts)
    frame_ = polar_factor(torch.randn(num_experts, hidden_size).to(x))
    return cosine_affinity(x, frame_, unit=True)


@pytest.mark.parametrize(("hidden_size", "num_experts"), SIZES)
def test_grap_equals_its_definition(hidden_size: int, num_experts: int) -> None:
    x = torch.randn(20, hidden_size, dtype=torch.float64)
    torch.testing.assert_close(grap_affinity(x, num_experts), reference.grap(x, num_experts))
    block = hidden_size // num_experts
    t, e = 3, num_experts - 1
    want = sum(x[t, e * block + i].item() for i in range(block)) / (
        math.sqrt(sum(v * v for v in x[t].tolist())) * math.sqrt(block)
    )
    assert grap_affinity(x, num_experts)[t, e].item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("frame", ["fixed", "learned", "orthonormal"])
@pytest.mark.parametrize(("hidden_size", "num_experts"), SIZES)
def test_range_and_sum_of_squares(frame: str, hidden_size: int, num_experts: int) -> None:
    x = torch.randn(500, hidden_size) * torch.rand(500, 1).mul(20).exp2()
    found = affinity(frame, x, num_experts)
    assert found.shape == (500, num_experts)
    assert float(found.abs().max()) <= 1 + 1e-6
    assert float(found.square().sum(-1).max()) <= 1 + 1e-5


@pytest.mark.parametrize("frame", ["fixed", "learned", "orthonormal"])
@pytest.mark.parametrize("factor", [1e-6, 0.3, 7.0, 1e6])
def test_scaling_a_token_changes_nothing(frame: str, factor: float) -> None:
    x = torch.randn(50, 16, dtype=torch.float64)
    torch.manual_seed(1)
    want = affinity(frame, x, 4)
    torch.manual_seed(1)
    torch.testing.assert_close(affinity(frame, x * factor, 4), want)
    torch.manual_seed(1)
    torch.testing.assert_close(affinity(frame, -x, 4), -want)


@pytest.mark.parametrize(("hidden_size", "num_experts"), SIZES)
def test_a_tokens_own_direction_gives_one_there_and_zero_elsewhere(
    hidden_size: int, num_experts: int
) -> None:
    block = hidden_size // num_experts
    gates = torch.zeros(num_experts, hidden_size)
    for e in range(num_experts):
        gates[e, e * block : (e + 1) * block] = num_experts / hidden_size
    identity = torch.eye(num_experts)
    torch.testing.assert_close(grap_affinity(gates, num_experts), identity)
    weight = torch.randn(hidden_size)
    own = torch.where(gates > 0, weight, 0.0)
    torch.testing.assert_close(learned_block_affinity(own, weight, num_experts), identity)
    frame = polar_factor(torch.randn(num_experts, hidden_size))
    found = cosine_affinity(3 * frame, frame, unit=True)
    torch.testing.assert_close(found, identity, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frame", ["fixed", "learned", "orthonormal"])
def test_a_zero_token_gives_zero_and_finite_gradients(frame: str) -> None:
    x = torch.zeros(3, 16, requires_grad=True)
    found = affinity(frame, x, 4)
    assert not found.any()
    found.softmax(-1).square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e15])
def test_extreme_lengths_stay_finite(size: float) -> None:
    x = (torch.randn(5, 16) * size).requires_grad_()
    found = grap_affinity(x, 4)
    found.square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(found).all()
    assert torch.isfinite(x.grad).all()
    assert float(found.detach().abs().max()) <= 1 + 1e-6


@pytest.mark.parametrize(("hidden_size", "num_experts"), SIZES)
def test_the_learned_frame_starts_as_the_fixed_one(hidden_size: int, num_experts: int) -> None:
    def layer(frame: str) -> MoE:
        router = EtrRouter(frame=frame)  # type: ignore[arg-type]
        return MoE(
            MoEConfig(
                hidden_size=hidden_size,
                intermediate_size=4,
                num_experts=num_experts,
                router=router,
            )
        )

    learned, x = layer("learned").router, torch.randn(30, hidden_size)
    weight = learned.get_parameter("weight")
    assert weight.shape == (hidden_size,)
    assert torch.equal(weight, torch.full((hidden_size,), num_experts / hidden_size))
    torch.testing.assert_close(
        learned_block_affinity(x, weight.detach(), num_experts), grap_affinity(x, num_experts)
    )


def with_condition(num_experts: int, hidden_size: int, condition: float) -> Tensor:
    """Random float64 matrix [E, H] with singular values from 1 down to 1 / condition."""
    u = torch.linalg.qr(torch.randn(num_experts, num_experts, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(hidden_size, num_experts, dtype=torch.float64))[0]
    return (u * torch.logspace(0, -math.log10(condition), num_experts).double()) @ v.T


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("condition", [1.0, 10.0, 1e2, 1e3])
@pytest.mark.parametrize(("hidden_size", "num_experts"), [(16, 4), (64, 64), (256, 64), (64, 2)])
def test_the_polar_factor_is_orthonormal_in_float32(
    hidden_size: int, num_experts: int, condition: float, scale: float
) -> None:
    weight = scale * with_condition(num_experts, hidden_size, condition)
    q = polar_factor(weight.float())
    assert q.dtype == torch.float32
    error = q.double() @ q.double().T - torch.eye(num_experts).double()
    assert float(error.abs().max()) < 1e-6
    u, _, vt = torch.linalg.svd(weight, full_matrices=False)
    assert float((q - u @ vt).abs().max()) < 3e-7 * condition + 1e-6
    assert condition_number(weight) == pytest.approx(condition, rel=1e-3)


def test_the_polar_factor_of_a_spike_with_equal_others() -> None:
    """One large direction among many equal small ones: the worst start for the iteration."""
    weight = torch.eye(64, 128)
    weight[0] *= 1e3
    q = polar_factor(weight)
    torch.testing.assert_close(q, torch.eye(64, 128), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num_experts", [1, 4, 16])
def test_gradients_exist_at_an_orthonormal_start(num_experts: int) -> None:
    weight = orthonormal_start(num_experts, 16).requires_grad_()
    torch.testing.assert_close(
        weight.detach() @ weight.detach().T, torch.eye(num_experts), atol=1e-6, rtol=0
    )
    x = torch.randn(9, 16)
    cosine_affinity(x, polar_factor(weight), unit=True)[:, 0].sum().backward()
    assert weight.grad is not None
    assert torch.isfinite(weight.grad).all()
    if num_experts < 16:
        assert weight.grad.any()


def test_gradcheck_of_the_frames() -> None:
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    block = torch.randn(8, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    orthonormal = orthonormal_start(4, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grap_affinity(x, 4), (x,))
    assert torch.autograd.gradcheck(lambda x, w: learned_block_affinity(x, w, 4), (x, block))
    scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cosine_affinity, (x, dense))
    scaled = partial(cosine_affinity, unit=True)
    assert torch.autograd.gradcheck(lambda x, w, s: scaled(x, w, scale=s), (x, dense, scale))
    assert torch.autograd.gradgradcheck(lambda x, w, s: scaled(x, w, scale=s), (x, dense, scale))
    assert torch.autograd.gradcheck(polar_factor, (dense,))
    assert torch.autograd.gradcheck(polar_factor, (orthonormal,))


@pytest.mark.parametrize(("num_experts", "hidden_size"), [(1, 5), (4, 8), (8, 8), (16, 64)])
@pytest.mark.parametrize("start", ["random", "orthonormal"])
def test_both_polar_factors_agree(num_experts: int, hidden_size: int, start: str) -> None:
    weight = torch.randn(num_experts, hidden_size, dtype=torch.float64)
    if start == "orthonormal":
        weight = orthonormal_start(num_experts, hidden_size).double()
    weight.requires_grad_()
    toward = torch.randn(num_experts, hidden_size, dtype=torch.float64)
    values, grads = [], []
    for function in (polar_factor, newton_schulz):
        factor = function(weight)
        values.append(factor.detach())
        grads.append(torch.autograd.grad((factor * toward).sum(), weight)[0])
    torch.testing.assert_close(*values, atol=1e-9, rtol=0)
    torch.testing.assert_close(*grads, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
@pytest.mark.parametrize("per_token", [False, True])
def test_cosines_and_their_gradients_equal_the_definition(num_tokens: int, per_token: bool) -> None:
    """Also where a token is zero, and for each example alone (torch.func)."""
    data = torch.randn(num_tokens, 12, dtype=torch.float64)
    data[3:4] = 0
    frame, upstream = torch.randn(4, 12).double(), torch.randn(num_tokens, 4).double()
    factor = torch.rand(num_tokens, 1).double() + 1 if per_token else torch.tensor(1.7).double()

    def plain(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        lengths = x.square().sum(-1, keepdim=True)
        lengths = torch.where(lengths == 0, 1e-24, lengths).sqrt()
        return x @ weight.T / lengths * scale

    def ours(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return cosine_affinity(x, weight, unit=True, scale=scale)

    found = []
    for function in (plain, ours):
        leaves = [value.clone().requires_grad_() for value in (data, frame, factor)]
        y = function(*leaves)
        found.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want)

    def of_one(x: Tensor, toward: Tensor) -> Tensor:
        return (cosine_affinity(x[None], frame, unit=True)[0] * toward).sum()

    if num_tokens:
        each = torch.func.vmap(torch.func.grad(of_one))(data, upstream)
        one = torch.stack(
            [torch.func.grad(of_one)(*pair) for pair in zip(data, upstream, strict=True)]
        )
        torch.testing.assert_close(each, one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", [product, partial(cosine_affinity, unit=True)], ids=["x", "cos"])
def test_tokens_in_half_precision_score_as_their_float32_copies(
    score: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Values and gradients bit for bit; second, forward and batched derivatives closely."""
    data, upstream, found = (torch.randn(5, 12) * 3).to(dtype), torch.randn(5, 4), []
    data[2] = 0
    for copied in (True, False):
        x, weight = data.clone().requires_grad_(), torch.arange(48.0).view(4, 12).requires_grad_()
        y = score(x.float() if copied else x, weight)
        first = torch.autograd.grad(y, (x, weight), upstream, create_graph=True)
        again = torch.autograd.grad(first[1].square().sum(), x)[0]
        found.append((y, *first, again))
    *plain, second = zip(*found, strict=True)
    for want, got in plain:
        assert want.dtype == got.dtype
        assert torch.equal(want, got)
    # Sums of numbers of 8 or 11 bits; that of the zero token overflows.
    wanted, got = (value[[0, 1, 3, 4]].float() for value in second)
    assert float((got - wanted).norm()) < 0.01 * float(wanted.norm())
    fixed, ways = weight.detach(), (torch.randn_like(data), torch.randn_like(weight))
    want = torch.func.jvp(lambda x, w: score(x.float(), w), (data, fixed), ways)
    torch.testing.assert_close(torch.func.jvp(score, (data, fixed), ways), want)
    each = torch.func.vmap(score, in_dims=(0, None))(data[:, None], fixed)[:, 0]
    torch.testing.assert_close(each, score(data, fixed))


@pytest.mark.parametrize("router", ["etr", "token_choice"])
def test_no_float32_copy_of_tokens_is_kept(router: str) -> None:
    """What the experts keep serves the router's backward pass too."""
    layer = MoE(MoEConfig(hidden_size=16, intermediate_size=5, num_experts=4, router=router))
    layer.bfloat16()
    kept: list[tuple[torch.dtype, int]] = []

    def pack(value: Tensor) -> Tensor:
        kept.append((value.dtype, value.numel()))
        return value

    x = torch.randn(37, 16).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        layer(x)
    assert (torch.bfloat16, x.numel()) in kept
    assert (torch.float32, x.numel()) not in kept


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden_size=10 .*num_experts=4"):
        grap_affinity(torch.randn(2, 10), 4)


def orthonormal_layer() -> MoE:
    router = EtrRouter(frame="orthonormal")
    return MoE(MoEConfig(hidden_size=16, intermediate_size=4, num_experts=4, router=router))


@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_directions_are_cached_in_eval_and_follow_the_weight(guard: type) -> None:
    layer = orthonormal_layer().eval()
    router = layer.router
    weight = router.get_parameter("weight")
    with guard():
        first = router.directions(torch.float32)
        assert router.directions(torch.float32) is first
        assert router.directions(torch.float64).dtype == torch.float64
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))
    with guard():
        second = router.directions(torch.float32)
        assert not torch.equal(second, first)
        torch.testing.assert_close(second, polar_factor(weight.detach()))
    before = weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    router.directions(torch.float32)[0, 0].backward()
    optimizer.step()
    assert not torch.equal(weight, before)
    with guard():
        torch.testing.assert_close(router.directions(torch.float32), polar_factor(weight.detach()))
    state = {**router.state_dict(), "weight": torch.randn(4, 16)}
    router.load_state_dict(state)
    with guard():
        torch.testing.assert_close(router.directions(torch.float32), polar_factor(state["weight"]))


@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_a_change_in_training_that_leaves_no_trace_is_seen_in_eval() -> None:
    """Sharded training writes through `data`, which bumps no version."""
    layer = orthonormal_layer().eval()
    weight = layer.router.get_parameter("weight")
    with torch.no_grad():
        layer.router.directions(torch.float32)
        layer.train()
        weight.data.normal_()
        layer.eval()
        found = layer.router.directions(torch.float32)
    torch.testing.assert_close(found, polar_factor(weight.detach()))


@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
@pytest.mark.parametrize("kept_in", [torch.float32, torch.bfloat16])
def test_a_graph_reads_known_directions_and_follows_the_weight(
    kept_in: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilers see one operator, which finds the directions anew only for other values."""
    router, found = orthonormal_layer().eval().to(kept_in).router, []
    weight = router.get_parameter("weight")

    def counted(value: Tensor) -> tuple[Tensor, ...]:
        found.append(value)
        return polar_parts(value)

    monkeypatch.setattr("etr.moe.polar.polar_parts", counted)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    for number in range(1, 3):
        want = polar_parts(weight.detach().float())[0]
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(router.directions(torch.float32), want)
                router.directions(torch.float32).zero_()  # what a graph gets is its own
        assert len(found) == number
        weight.data.normal_()  # leaves no trace
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(known_factor, (weight.detach(), torch.float32), **checks)


def test_directions_of_weights_that_are_gone_are_forgotten() -> None:
    router = orthonormal_layer().router
    router.directions(torch.float32)
    before = len(_KNOWN)
    del router
    for _ in range(2):
        orthonormal_layer().router.directions(torch.float32)
    assert len(_KNOWN) <= before


@pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
def test_a_layer_made_in_inference_mode_runs() -> None:
    with torch.inference_mode():
        layer = orthonormal_layer().eval()
        assert layer(torch.randn(3, 16)).hidden_states.shape == (3, 16)


def test_training_builds_a_graph_to_the_weight() -> None:
    layer = orthonormal_layer()
    layer(torch.randn(6, 16)).hidden_states.square().sum().backward()
    gradient = layer.router.get_parameter("weight").grad
    assert gradient is not None
    assert gradient.any()


def test_micro_batches_share_directions_and_get_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = orthonormal_layer().double()
    weight, found = layer.router.get_parameter("weight"), []
    upstream = torch.randn(4, 16, dtype=torch.float64)

    def counted(value: Tensor) -> tuple[Tensor, ...]:
        found.append(value)
        return polar_parts(value)

    def same_as_alone() -> None:
        alone = polar_factor(weight, polar_parts(weight))
        shared = layer.router.directions(torch.float64)
        assert torch.equal(shared, alone)
        want, got = (torch.autograd.grad(q, weight, upstream)[0] for q in (alone, shared))
        assert torch.equal(got, want)

    monkeypatch.setattr("etr.moe.polar.polar_parts", counted)
    with torch.inference_mode():  # what it keeps then must still serve training
        layer(torch.randn(3, 16, dtype=torch.float64))
    for _ in range(2):
        same_as_alone()
        x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
        y = checkpoint(lambda x: layer(x).hidden_states, x, use_reentrant=False)
        y.sum().backward()
    assert len(found) == 1
    weight.data.mul_(1.5).add_(0.1)  # leaves no trace
    same_as_alone()
    assert len(found) == 2
    functional_call(layer, {"router.weight": torch.randn(4, 16, dtype=torch.float64)}, (x,))
    assert len(found) == 3  # an argument's are found each time, and not kept
    same_as_alone()
    assert len(found) == 3


@pytest.mark.parametrize(("condition", "warned"), [(500.0, False), (5000.0, True)])
def test_a_bad_condition_number_is_reported(condition: float, warned: bool) -> None:
    layer = orthonormal_layer()
    with torch.no_grad():
        layer.router.get_parameter("weight").copy_(with_condition(4, 16, condition))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.eval()
    assert any("condition number" in str(w.message) for w in caught) == warned


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_weights_that_diverged_give_nan_and_no_error(bad: float) -> None:
    weight = torch.randn(2, 3, 8, dtype=torch.float64)
    weight[1, 0, 0] = bad
    q = polar_factor(weight)
    torch.testing.assert_close(q[0], polar_factor(weight[0]))
    assert q[1].isnan().all()
    assert condition_number(weight[0]) < math.inf
    if not math.isfinite(bad):
        assert condition_number(weight[1]) == math.inf
