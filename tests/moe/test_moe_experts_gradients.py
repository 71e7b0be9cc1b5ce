"""Every expert backend: values and gradients of the plain formula, and little kept for backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from etr.moe import EXPERT_BACKENDS, Routing
from etr.moe.dispatch import DispatchHandle, Permute
from etr.moe.experts import ACTIVATIONS, GATED, Clamp, ExpertParams, activate
from etr.moe.experts.activation import activate_out, activation_grad, activation_grad_out
from etr.moe.experts.feed_forward import Problem, Route, feed_forward, flat
from etr.moe.experts.one_by_one import OneByOne
from etr.moe.routing import Limit, Selection
from etr.moe.select import select, token_pairs, top_experts

T, H, I, E = 24, 16, 8, 4  # noqa: E741
BACKENDS = [name for name in EXPERT_BACKENDS if EXPERT_BACKENDS[name].unavailable() is None]


def params_of(
    activation: str, dtype: torch.dtype, num_experts: int = E, *, bias: bool = False
) -> ExpertParams:
    width = 2 * I if activation in GATED else I
    biases: dict[str, Tensor] = {}
    if bias:
        biases = {
            "up_bias": torch.randn(num_experts, width).to(dtype).requires_grad_(),
            "down_bias": torch.randn(num_experts, H).to(dtype).requires_grad_(),
        }
    return ExpertParams(
        up=torch.randn(num_experts, width, H).div(4).to(dtype).requires_grad_(),
        down=torch.randn(num_experts, H, I).div(4).to(dtype).requires_grad_(),
        activation=activation,  # type: ignore[arg-type]
        clamp=Clamp(limit=0.75, alpha=1.5),  # so that it cuts often
        **biases,
    )


def leaves_of(params: ExpertParams) -> tuple[Tensor, ...]:
    """Every weight there is."""
    found = (params.up, params.down, params.up_bias, params.down_bias)
    return tuple(tensor for tensor in found if tensor is not None)


def routed(
    top_k: int = 2, capacity: int | None = 9, num_tokens: int = T, spare: int = 0
) -> tuple[Routing, Selection]:
    """Choices of tokens that leave the last expert alone, and what a capacity keeps of them."""
    scores = torch.rand(num_tokens, E)
    scores[:, -1] = -1
    expert = top_experts(scores, top_k)
    token, flat = token_pairs(expert, torch.rand(num_tokens) > 0.1, E)
    gate = torch.rand(num_tokens * top_k).requires_grad_()
    routing = Routing(
        token=token,
        expert=flat,
        score=scores.gather(1, expert).flatten(),
        gate=gate,
        valid_mask=torch.ones(num_tokens, dtype=torch.bool),
        scores=scores,
        logits=None,
        probs=None,
        num_experts=E,
        top_k=top_k,
    )
    limit = Limit()
    if capacity is not None:
        limit = Limit(capacity=torch.full((E,), capacity), buffer_size=capacity + spare)
    return routing, select(routing, limit, rank_by="score")


def expected(x: Tensor, routing: Routing, selection: Selection, params: ExpertParams) -> Tensor:
    """One pair at a time."""
    y = torch.zeros_like(x)
    for pair in selection.kept.nonzero().flatten().tolist():
        t, e = int(routing.token[pair]), int(routing.expert[pair])
        hidden = x[t] @ params.up[e].T
        if params.up_bias is not None:
            hidden = hidden + params.up_bias[e]
        out = activate(hidden, params.activation, params.clamp) @ params.down[e].T
        if params.down_bias is not None:
            out = out + params.down_bias[e]
        y = y.index_add(
            0, torch.tensor([t]), selection.combine_weight[pair].to(x.dtype) * out[None]
        )
    return y


def gradients(y: Tensor, upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(y, inputs, upstream, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.mark.usefixtures("nan_filled_memory")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("capacity", [None, 9, 1])
@pytest.mark.parametrize("name", BACKENDS)
def test_tokens_in_tokens_out(
    name: str, capacity: int | None, bias: bool, activation: str, dtype: torch.dtype
) -> None:
    x = torch.randn(T, H).to(dtype).requires_grad_()
    params = params_of(activation, dtype, bias=bias)
    routing, selection = routed(2, capacity, spare=2)
    upstream, leaves = torch.randn(T, H).to(dtype), (x, routing.gate, *leaves_of(params))
    y = Permute().run(x, routing, selection, EXPERT_BACKENDS[name], params)
    want = expected(x, routing, selection, params)
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(y, want, atol=limit, rtol=limit)
    got_grads, want_grads = gradients(y, upstream, *leaves), gradients(want, upstream, *leaves)
    for got, wanted in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=limit * 4, rtol=limit)
    for grad in got_grads[2:]:
        assert not grad[-1].any()  # nobody chose the last expert


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_the_fused_way_equals_dispatch_run_combine(name: str, bias: bool) -> None:
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    params, (routing, selection) = params_of("swiglu", torch.float64, bias=bias), routed()
    backend, dispatcher = EXPERT_BACKENDS[name], Permute()
    rows, handle = dispatcher.dispatch(x, routing, selection, padded=backend.padded)
    apart = dispatcher.combine(backend.run(rows, handle.num_tokens_per_expert, params), handle)
    fused = dispatcher.run(x, routing, selection, backend, params)
    torch.testing.assert_close(fused, apart)
    upstream, leaves = torch.randn_like(x), (x, routing.gate, *leaves_of(params))
    torch.testing.assert_close(
        gradients(fused, upstream, *leaves), gradients(apart, upstream, *leaves)
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", BACKENDS)
def test_gradcheck(name: str, activation: str) -> None:
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    params, (routing, selection) = params_of(activation, torch.float64), routed()
    handle = Permute().plan(routing, selection, padded=EXPERT_BACKENDS[name].padded)
    index = (handle.token_of_row, handle.rows_by_token, handle.start_of_token)
    weight = handle.weight_of_row.detach().double().requires_grad_()

    def run(x: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        handle_ = DispatchHandle(
            token_of_row=index[0],
            weight_of_row=weight,
            rows_by_token=index[1],
            start_of_token=index[2],
            num_tokens_per_expert=handle.num_tokens_per_expert,
            num_tokens=T,
        )
        given = ExpertParams(up=up, down=down, activation=params.activation)
        return EXPERT_BACKENDS[name].run_routed(x, handle_, given)

    inputs = (x, weight, params.up, params.down)
    if EXPERT_BACKENDS[name].padded:  # weights of empty rows lead nowhere
        inputs = (x, params.up, params.down)
        assert torch.autograd.gradcheck(
            lambda x, up, down: run(x, weight.detach(), up, down), inputs, fast_mode=True
        )
    else:
        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_tokens_and_nothing_kept(name: str) -> None:
    for num_tokens, capacity in ((0, None), (T, 0)):
        x = torch.randn(num_tokens, H, requires_grad=True)
        params, (routing, selection) = params_of("swiglu", x.dtype), routed(2, capacity, num_tokens)
        y = Permute().run(x, routing, selection, EXPERT_BACKENDS[name], params)
        assert y.shape == x.shape
        assert not y.any()
        y.sum().backward()
        assert x.grad is not None
        assert params.up.grad is not None
        assert not x.grad.any()
        assert not params.up.grad.any()


@pytest.mark.parametrize("frozen", range(4))
@pytest.mark.parametrize("name", BACKENDS)
def test_a_frozen_input_changes_no_other_gradient(name: str, frozen: int) -> None:
    found = []
    torch.manual_seed(0)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    params, (routing, selection) = params_of("swiglu", torch.float64), routed()
    leaves = [x, routing.gate, params.up, params.down]
    for freeze in (False, True):
        weight = selection.combine_weight
        if freeze and frozen == 1:
            weight = weight.detach()
        given = [leaf.detach() if freeze and i == frozen else leaf for i, leaf in enumerate(leaves)]
        handle = Permute().plan(routing, selection, padded=EXPERT_BACKENDS[name].padded)
        if freeze and frozen == 1:
            handle = _detached(handle)
        y = EXPERT_BACKENDS[name].run_routed(
            given[0], handle, ExpertParams(up=given[2], down=given[3], activation="swiglu")
        )
        found.append(gradients(y, torch.ones_like(y), *leaves))
    for i, (with_all, without) in enumerate(zip(*found, strict=True)):
        if i != frozen:
            assert torch.equal(with_all, without)


def _detached(handle: DispatchHandle) -> DispatchHandle:
    fields = {**vars(handle), "weight_of_row": handle.weight_of_row.detach()}
    return DispatchHandle(**fields)


@pytest.mark.parametrize("name", BACKENDS)
def test_backward_may_run_twice_but_not_be_differentiated(name: str) -> None:
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    params, (routing, selection) = params_of("swiglu", torch.float64), routed()
    y = Permute().run(x, routing, selection, EXPERT_BACKENDS[name], params)
    first = gradients(y, torch.ones_like(y), x, params.up, params.down)
    again = gradients(y, torch.ones_like(y), x, params.up, params.down)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def saved_bytes(run: object, weights: tuple[Tensor, ...]) -> int:
    """Bytes that autograd keeps for backward beside the weights, each storage once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()  # type: ignore[operator]
    for weight in weights:
        sizes.pop(weight.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    return sum(sizes.values())


def plain_grouped_mm(
    x: Tensor, routing: Routing, selection: Selection, params: ExpertParams
) -> Tensor:
    key = torch.where(selection.kept, routing.expert, routing.num_experts)
    pair = key.argsort(stable=True)[: int(selection.num_tokens_per_expert.sum())]
    ends = selection.num_tokens_per_expert.cumsum(0).int()
    hidden = F.grouped_mm(x[routing.token[pair]], params.up.transpose(1, 2), offs=ends)
    active = activate(hidden, params.activation).contiguous()
    out = F.grouped_mm(active, params.down.transpose(1, 2), offs=ends)
    weighted = out * selection.combine_weight[pair, None]
    return torch.zeros_like(x).index_add(0, routing.token[pair], weighted)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", ["loop", "grouped_mm"])
def test_backward_keeps_at_most_three_fifths_of_plain_autograd(name: str, top_k: int) -> None:
    """Dropless, against the same computation in torch's own operations."""
    x = torch.randn(512, H, requires_grad=True)
    params, (routing, selection) = params_of("swiglu", x.dtype), routed(top_k, None, 512)
    weights = (params.up, params.down)
    ours = saved_bytes(
        lambda: Permute().run(x, routing, selection, EXPERT_BACKENDS[name], params), weights
    )
    plain = saved_bytes(lambda: plain_grouped_mm(x, routing, selection, params), weights)
    assert ours <= 0.6 * plain
    rows = int(selection.num_tokens_per_expert.sum())
    index = 8 * (2 * rows + rows + 513 + E)  # and a weight a row
    assert ours <= 4 * (512 * H + rows * 2 * I) + 2 * index + 4096


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_closed_form_activation_gradients(activation: str) -> None:
    hidden = torch.randn(7, 10, dtype=torch.float64).mul(8).requires_grad_()  # beyond the clamp
    active = activate(hidden, activation)  # type: ignore[arg-type]
    upstream = torch.randn_like(active)
    (want,) = torch.autograd.grad(active, hidden, upstream)
    with torch.no_grad():
        plain = activation_grad(hidden, upstream, activation)  # type: ignore[arg-type]
        out = activation_grad_out(
            hidden,
            upstream.clone(),
            activation,  # type: ignore[arg-type]
            torch.empty_like(hidden),
        )
        values = activate_out(hidden, activation, torch.empty_like(active))  # type: ignore[arg-type]
    torch.testing.assert_close(plain, want)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(values, active)


def test_rows_stand_in_expert_order_and_return_to_their_token() -> None:
    routing, selection = routed()
    x = torch.arange(T, dtype=torch.float64)[:, None].expand(T, H).contiguous()
    for padded in (False, True):
        handle = Permute().plan(routing, selection, padded=padded)
        counts = selection.num_tokens_per_expert.tolist()
        rows, _ = Permute().dispatch(x, routing, selection, padded=padded)
        if padded:
            rows = torch.cat([chunk[:n] for chunk, n in zip(rows, counts, strict=True)])
        used = handle.token_of_row[handle.token_of_row < T]
        assert rows[:, 0].long().tolist() == used.tolist()
        start = 0
        for e, count in enumerate(counts):
            mine = selection.kept & (routing.expert == e)
            assert sorted(used[start : start + count].tolist()) == routing.token[mine].tolist()
            start += count


def looped(x: Tensor, params: ExpertParams, *, routed_rows: bool) -> Problem:
    """What the loop runs for tokens, or for rows as they are."""
    if not routed_rows:
        counts = torch.tensor([len(x) - 5, 0, 5, 0])
        return Problem(x, None, counts, params.up, params.down, params.up_bias, params.activation)
    handle = Permute().plan(*routed(), padded=False)
    route = Route(
        handle.weight_of_row.to(x.dtype).detach().requires_grad_(),
        handle.token_of_row,
        handle.rows_by_token,
        handle.start_of_token,
        handle.padded,
    )
    counts = handle.num_tokens_per_expert
    return Problem(x, route, counts, params.up, params.down, params.up_bias, params.activation)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("routed_rows", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_compiler_sees_the_loop_as_operators(
    activation: str, routed_rows: bool, bias: bool
) -> None:
    """What it is told of their schema and shapes is so, and values and gradients are the same."""
    params = params_of(activation, torch.float64, bias=bias)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    problem = looped(x, params, routed_rows=routed_rows)
    tensors, *options = flat(problem)
    leaves = [tensor for tensor in tensors[:5] if tensor is not None]
    detached = [None if tensor is None else tensor.detach() for tensor in tensors]
    wanted, forward = [tensor is not None for tensor in tensors[:5]], torch.ops.etr.one_by_one
    out, hidden = forward(detached, *options, True)
    back = (detached, *options, hidden, torch.randn_like(out), wanted)
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    for keep in (False, True):
        torch.library.opcheck(forward.default, (detached, *options, keep), **checks)
    torch.library.opcheck(torch.ops.etr.one_by_one_backward.default, back, **checks)

    torch._dynamo.reset()
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    upstream, found = torch.randn_like(out), []
    for run in (feed_forward, compiled):
        y = run(OneByOne(), problem)
        found.append([y, *torch.autograd.grad(y, leaves, upstream)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_sees_grouped_products_as_operators(dtype: torch.dtype) -> None:
    """On a CPU it knows torch's own of bfloat16 alone."""
    ends = torch.tensor([3, 3, T], dtype=torch.int32)
    rows, other = torch.randn(T, H).to(dtype), torch.randn(T, I).to(dtype)
    weight = torch.randn(len(ends), I, H).to(dtype).transpose(1, 2)
    forward, checks = torch.ops.etr.grouped_mm.default, ("test_schema", "test_faketensor")
    for left, right in ((rows, weight), (rows.T, other)):
        torch.library.opcheck(forward, (left, right, ends), test_utils=checks)
        found, want = forward(left, right, ends), F.grouped_mm(left, right, offs=ends)
        assert torch.equal(found, want)
        assert found.stride() == want.stride() == torch.empty(found.shape).stride()
