"""Predicted steps and memory: against a model that was measured, and where the answer is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from etr.cluster.cost import (
    Cluster,
    Device,
    Layout,
    Links,
    ModelShape,
    RoutingShape,
    expected_rows,
    journey,
    memory_of,
    peak_memory,
    step_of,
)
from etr.cluster.cost.memory import stage_parameters
from etr.cluster.cost.pipeline import chrome_trace, draw, run_pipeline
from etr.cluster.cost.routing import between_nodes
from etr.cluster.cost.travel import layer_journey
from etr.moe import DISPATCHERS
from etr.moe.dispatch import Dispatcher, parse_dispatcher

INFINITE = float("inf")
SMALL = ModelShape(
    name="small",
    hidden_size=64,
    num_layers=4,
    expert_size=96,
    num_experts=8,
    top_k=2,
    num_heads=4,
    num_key_value_heads=2,
    head_size=16,
    vocab_size=96,
)
DEVICE = Device(flops_per_second=1e9, memory_bytes=1e9, memory_bytes_per_second=INFINITE)
FREE = Links(
    latency_seconds=0.0, within_bytes_per_second=INFINITE, between_bytes_per_second=INFINITE
)
SLOW = Links(latency_seconds=1e-3, within_bytes_per_second=1e8, between_bytes_per_second=1e7)
ACROSS = [name for name, kind in DISPATCHERS.items() if kind.needs_ranks]


def cluster(links: Links = FREE, nodes: int = 4) -> Cluster:
    return Cluster(name="test", num_nodes=nodes, devices_per_node=4, device=DEVICE, links=links)


def routing(dispatch: str = "all_to_all", **values) -> RoutingShape:
    return RoutingShape(**{"name": "x", "dispatch": dispatch, "capacity": ((0.0, 1.0),), **values})


@pytest.mark.parametrize("dispatch", ACROSS)
def test_a_free_network_leaves_pure_compute(dispatch):
    layout = Layout(
        tensor=2, pipeline=2, data=4, expert=4, expert_tensor=2, micro_batches=4, sequence_length=64
    )
    found = step_of(SMALL, cluster(), layout, routing(dispatch))
    tokens, heads = 64, SMALL.num_heads * 16
    per_token = 2 * (64 * heads + 64 * 2 * 32 + heads * 64)  # projections
    per_token += 2 * 64 * heads  # scores and values, half of both masked
    per_token += 2 * 64 * 8 + 2 * 2 * 3 * 64 * 96  # router; two experts
    layers = SMALL.num_layers * tokens * per_token
    head = 2 * tokens * 64 * 96
    # Forward and twice that backward; a stage has two layers, shared by two ranks.
    stage = 3 * (layers / 2 + head) / 2 / 1e9
    busiest = layout.micro_batches * stage
    bubble = found.parts["pipeline bubble"]
    assert found.seconds == pytest.approx(busiest + bubble)
    assert found.parts["exposed exchange"] == found.parts["gradient reduction"] == 0
    assert bubble == pytest.approx(3 * layers / 2 / 2 / 1e9)  # the first stage's, once


@pytest.mark.parametrize("dispatch", [*ACROSS, "chunked:all_to_all_padded", "chunked:group_wise"])
def test_parts_sum_to_the_step_and_a_network_takes_time(dispatch):
    layout = Layout(tensor=2, data=8, expert=8, micro_batches=2, sequence_length=64)
    free, slow = (
        step_of(SMALL, cluster(links), layout, routing(dispatch)) for links in (FREE, SLOW)
    )
    for step in (free, slow):
        assert sum(step.parts.values()) == pytest.approx(step.seconds)
        assert max(event.end_seconds for event in step.events) == pytest.approx(step.seconds)
    assert slow.seconds > free.seconds
    assert slow.bytes_between_nodes == free.bytes_between_nodes > 0


@pytest.mark.parametrize("dispatch", ACROSS)
def test_what_is_sent_is_received(dispatch):
    rows = expected_rows(
        routing(dispatch, load=(0.5, 1.0, 2.5), local_share=0.4),
        num_experts=16,
        top_k=2,
        tokens_per_rank=96,
        num_ranks=8,
        node_size=2,
    )
    found = journey(parse_dispatcher(dispatch), rows, row_bytes=1.0, weight_bytes=0.0)
    there, back = found.there[-1], found.back[0]
    assert there.sum() == pytest.approx(back.sum())
    np.testing.assert_allclose(there.sum(0), back.sum(1))  # what comes to a rank leaves it
    if not routing(dispatch).padded:
        # Every kept pair is a row of its last exchange, and is computed where it arrives.
        np.testing.assert_allclose(there.sum(0), found.computed.sum(1))
        own = np.arange(8) // 2
        near = rows.pairs[own[:, None] == own].sum() / rows.pairs.sum()
        assert near == pytest.approx(0.4)


def test_a_dispatcher_of_ones_own_is_refused_by_name():
    rows = expected_rows(
        routing(), num_experts=8, top_k=2, tokens_per_rank=9, num_ranks=4, node_size=2
    )
    with pytest.raises(ValueError, match="dispatch='mine' is not one that the cost model knows"):
        journey(type("Mine", (Dispatcher,), {"name": "mine", "summary": ""})(), rows, 1.0, 0.0)


@pytest.mark.parametrize("lending", ["least_loaded", "chunked:least_loaded"])
def test_ranks_that_lend_experts_wait_for_none(lending):
    """All choices want one expert: its rank's time is the mean, not that of all rows."""
    crowded = {"load": (1.0, *[0.0] * 7), "capacity": ()}
    layout = Layout(data=4, expert=4, sequence_length=64)
    plain, lent = (
        step_of(SMALL, cluster(SLOW), layout, routing(name, **crowded))
        for name in ("all_to_all", lending)
    )
    assert lent.parts["experts"] == pytest.approx(plain.parts["experts"] / 4, rel=0.02)
    kept = [memory_of(SMALL, layout, routing(n, **crowded)) for n in ("all_to_all", lending)]
    # Rows that a rank computes are all of them, or a quarter.
    row = (2 * SMALL.expert_size + 2 * SMALL.hidden_size) * layout.activation_bytes
    rows = 4 * 64 * SMALL.top_k
    less = kept[0].activation_bytes - kept[1].activation_bytes
    assert less == pytest.approx(SMALL.num_layers * row * rows * 3 / 4)


EVERY = [*ACROSS, *(f"chunked:{name}" for name in ACROSS if name != "chunked"), "permute"]
UNEVEN = {"load": (0.2, 0.5, 1.0, 1.5, 3.0), "capacity": ((0.0, 1.2),)}


@pytest.mark.parametrize("dispatch", EVERY)
def test_who_sends_changes_nothing_that_is_computed(dispatch):
    """Whatever the local share and the nodes, experts get the rows that they keep."""
    layout = Layout(tensor=2, data=8, expert=8, sequence_length=64)
    if dispatch == "permute":
        layout = Layout(sequence_length=64)
    nodes = (1,) if dispatch == "permute" else (1, 2, 4)
    first = layer_journey(SMALL, layout, routing(dispatch, **UNEVEN), 1, 1.0).computed
    memory = memory_of(SMALL, layout, routing(dispatch, **UNEVEN))
    for share in (None, 0.0, 0.3, 0.9, 1.0):
        told = routing(dispatch, **UNEVEN, local_share=share)
        for size in nodes:
            found = layer_journey(SMALL, layout, told, size, 1.0).computed
            np.testing.assert_allclose(found, first, rtol=1e-12, atol=1e-9)
        assert memory_of(SMALL, layout, told).total_bytes == pytest.approx(memory.total_bytes)


@pytest.mark.parametrize(
    ("share", "local", "want"),
    [
        ((0.75, 0.25), None, [[0.75, 0.25], [0.75, 0.25]]),
        ((0.5, 0.5), 0.9, [[0.9, 0.1], [0.1, 0.9]]),
        ((0.75, 0.25), 0.6, [[0.85, 0.15], [0.65, 0.35]]),
        ((0.75, 0.25), 1.0, [[1.0, 0.0], [0.5, 0.5]]),  # the second node keeps half of its tokens
        ((0.75, 0.25), 0.0, [[0.5, 0.5], [1.0, 0.0]]),
        ((0.2, 0.2, 0.2), 1.0, np.diag([0.6] * 3)),  # 0.6 of the choices are kept
        ((0.2, 0.2, 0.2), 0.0, 0.3 * (1 - np.eye(3))),
        ((1.0, 0.0), 0.2, [[1.0, 0.0], [1.0, 0.0]]),  # no node has a choice
        ((0.7,), 0.2, [[0.7]]),
    ],
)
def test_a_local_share_within_what_the_load_allows(share, local, want):
    found = between_nodes(np.array(share), local)
    np.testing.assert_allclose(found, want, atol=1e-12)
    np.testing.assert_allclose(found.sum(0), len(share) * np.array(share))
    np.testing.assert_allclose(found.sum(1), sum(share))


def test_loads_are_dealt_however_many_are_given():
    given = tuple(float(n) for n in range(1, 9))
    found = routing(load=given).load_of(8)
    assert sorted(found * 36) == pytest.approx(given)
    assert found.tolist() != sorted(found)
    assert found.tolist() == routing(load=given[::-1]).load_of(8).tolist()
    # The hottest experts stand on different ranks.
    assert found.reshape(4, 2).sum(1).max() < (7 + 8) / 36


@pytest.mark.parametrize(("dispatch", "chunks"), [("all_to_all", 1), ("chunked:all_to_all", 4)])
@pytest.mark.parametrize("recompute", [False, True])
def test_counts_travel_in_forward_passes_alone(dispatch, chunks, recompute):
    """With latencies alone: three exchanges forward, two backward, each in every chunk."""
    links = dataclasses.replace(FREE, latency_seconds=1e-3)
    fast = dataclasses.replace(DEVICE, flops_per_second=INFINITE)
    quick = dataclasses.replace(cluster(links), device=fast)
    layout = Layout(data=8, expert=8, micro_batches=2, sequence_length=64, recompute=recompute)
    found = step_of(SMALL, quick, layout, routing(dispatch))
    exchanges = 3 + 2 + 3 * recompute
    want = SMALL.num_layers * layout.micro_batches * exchanges * chunks * 1e-3
    assert found.parts["exposed exchange"] == pytest.approx(want)


def test_gradients_and_micro_batches_pass_over_the_network():
    links = dataclasses.replace(FREE, latency_seconds=1e-3, within_bytes_per_second=1e8)
    layout = Layout(data=4, expert=2, sequence_length=64)
    found = step_of(SMALL, cluster(links), layout, routing()).parts["gradient reduction"]
    dense, experts = stage_parameters(SMALL, layout, 0)
    # Four ranks in one ring; experts in two rings of two. All share the node's link.
    there = 3 * (1e-3 + 4 * 4 * dense / 4 / 1e8) + 1 * (1e-3 + 2 * 2 * 4 * experts / 2 / 1e8)
    assert found == pytest.approx(1.5 * there)  # back come weights, half as wide
    layout = Layout(pipeline=2, data=2, sequence_length=64)
    events = step_of(SMALL, cluster(links), layout, routing("permute")).events
    first, second = (next(e for e in events if (e.stage, e.kind) == (s, "forward")) for s in (0, 1))
    hop = second.start_seconds - first.end_seconds
    assert hop == pytest.approx(1e-3 + 2 * 64 * SMALL.hidden_size * 2 / 1e8)


def test_padding_sends_and_computes_the_buffers():
    rows = expected_rows(
        routing("all_to_all_padded", capacity=((0.0, 1.5),)),
        num_experts=8, top_k=1, tokens_per_rank=50, num_ranks=4, node_size=2,
    )  # fmt: skip
    assert rows.slots.tolist() == [10] * 4  # ceil(1.5 * 50 / 8)
    found = journey(parse_dispatcher("all_to_all_padded"), rows, 3.0, 0.0)
    assert found.computed.tolist() == [[40.0] * 2] * 4
    assert found.there[0].tolist() == [[60.0] * 4] * 4


def test_capacity_keeps_what_it_leaves_of_the_load():
    told = routing(load=(0.0, 1.0, 1.0, 2.0), capacity=((0.0, 0.5), (1.0, 1.5)))
    assert sorted(told.kept_at(0.5, 4)) == [0.0, 0.25, 0.25, 0.25]  # factor 1
    assert sorted(told.kept_at(1.0, 4)) == [0.0, 0.25, 0.25, 0.375]
    given = dataclasses.replace(told, kept_share=((0.0, 0.6),))
    assert given.kept_at(0.3, 4).sum() == pytest.approx(0.6)
    assert sorted(told.load_of(4)) == [0.0, 0.25, 0.25, 0.5]
    assert told.load_of(64).sum() == pytest.approx(1.0)


def test_an_even_pipeline_waits_for_its_stages_once():
    events = run_pipeline([1.0] * 4, [2.0] * 4, 0.0, 8)
    assert max(event.end_seconds for event in events) == 3.0 * (8 + 3)
    assert len(events) == 2 * 4 * 8
    late = run_pipeline([1.0] * 4, [2.0] * 4, 0.5, 1)
    assert max(event.end_seconds for event in late) == 12.0 + 6 * 0.5


def test_a_timeline_is_drawn_and_written():
    events = run_pipeline([1.0, 1.0], [2.0, 2.0], 0.0, 2)
    assert draw(events, width=9).splitlines() == ["stage  0  FF..BB.BB", "stage  1  .FBBFBB.."]
    found = chrome_trace({"a": events})["traceEvents"]
    assert found[0]["args"] == {"name": "a"}
    assert {event["name"] for event in found[1:]} == {
        f"{k} {n}" for k in ("forward", "backward") for n in (0, 1)
    }
    assert max(event["ts"] + event["dur"] for event in found[1:]) == 9e6


def test_stages_in_front_keep_more_micro_batches():
    layout = Layout(pipeline=4, micro_batches=8, sequence_length=64)
    kept = [memory_of(SMALL, layout, routing(), stage=s).activation_bytes for s in range(3)]
    assert kept[0] / kept[2] == pytest.approx(4 / 2)
    assert peak_memory(SMALL, layout, routing()).total_bytes == max(
        memory_of(SMALL, layout, routing(), stage=s).total_bytes for s in range(4)
    )


@pytest.mark.parametrize(("hidden", "experts", "top_k"), [(64, 4, 2), (96, 8, 1)])
def test_memory_of_a_model_that_was_measured(hidden, experts, top_k):
    """All tensors that autograd keeps, with every storage counted once."""
    pytest.importorskip("transformers")
    from transformers import MixtralConfig

    from etr.hf import EtrConfig, EtrForCausalLM

    base = MixtralConfig(
        vocab_size=160, hidden_size=hidden, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=experts,
        num_experts_per_tok=top_k, sliding_window=None,
    )  # fmt: skip
    options = {"router": "token_choice", "capacity": "none"}
    model = EtrForCausalLM(EtrConfig(base_config=base, moe=options)).train()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 160, (2, 96))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that none is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()

    def nbytes(tensors) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    shape = ModelShape(
        name="measured", hidden_size=hidden, num_layers=3, expert_size=128, num_experts=experts,
        top_k=top_k, num_heads=4, num_key_value_heads=2, head_size=hidden // 4, vocab_size=160,
    )  # fmt: skip
    layout = Layout(
        sequence_length=96, sequences=2, weight_bytes=4, gradient_bytes=4, optimizer_bytes=8,
        activation_bytes=4, norm_copies=3,
    )  # fmt: skip
    found = memory_of(shape, layout, RoutingShape(name="x", dispatch="permute"))
    state = [v for s in optimizer.state.values() for v in s.values() if v.numel() > 1]
    assert found.parameter_bytes == nbytes(model.parameters())
    assert found.gradient_bytes == nbytes(p.grad for p in model.parameters())
    assert found.optimizer_bytes == nbytes(state)
    assert found.activation_bytes == pytest.approx(nbytes(saved.values()), rel=0.05)
