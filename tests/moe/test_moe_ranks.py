"""What ranks need and one process can check: topology, dispatcher names, clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from etr.moe import DISPATCHERS, ExpertParallel, MoE, MoEConfig, Topology
from etr.moe.dispatch import parse_dispatcher
from etr.moe.dispatch.chunked import Chunked, in_turns


def test_topology_from_the_launcher() -> None:
    env = {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "GROUP_RANK": "1"}
    assert Topology.from_environment(env).node_of_rank == (0, 0, 1, 1, 2, 2)
    assert Topology.from_environment({}).node_of_rank == (0,)
    assert Topology.from_environment({"WORLD_SIZE": "3"}).node_of_rank == (0, 0, 0)


@pytest.mark.parametrize(
    "change",
    [{"LOCAL_WORLD_SIZE": "4"}, {"GROUP_RANK": "2"}],
    ids=["uneven nodes", "ranks out of order"],
)
def test_an_environment_that_is_no_grid(change: dict[str, str]) -> None:
    env = {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "GROUP_RANK": "1"}
    with pytest.raises(ValueError, match=r"give Topology\(node_of_rank=\.\.\.\)"):
        Topology.from_environment({**env, **change})


def test_a_topology_without_ranks() -> None:
    with pytest.raises(ValueError, match=r"node_of_rank=\(\) is empty"):
        Topology(())


@pytest.mark.parametrize("name", list(DISPATCHERS))
def test_every_dispatcher_has_a_name_and_a_summary(name: str) -> None:
    dispatcher = parse_dispatcher(name)
    assert dispatcher.name == name
    assert dispatcher.summary
    assert parse_dispatcher(name) == dispatcher


def test_options_of_a_dispatcher() -> None:
    assert parse_dispatcher("chunked:dedup,chunks=3") == Chunked(
        wrapped=parse_dispatcher("dedup"), chunks=3
    )
    assert parse_dispatcher("chunked:chunks=2").wrapped.name == "all_to_all"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alltoall", "dispatch='alltoall' is unknown; choose one of auto, permute"),
        ("chunked:alltoall", "dispatch='alltoall' is unknown"),
        ("chunked:auto", "dispatch='auto' is unknown; choose one of auto, permute"),
        ("chunked:permute", "wrapped='permute': only what sends rows"),
        ("chunked:chunked", "wrapped='chunked': only what sends rows"),
        ("chunked:chunks=0", "chunks=0 must be at least 1"),
        ("chunked:chunks=two", "chunks='two' must be an integer"),
        ("chunked:size=2", "has no option size; it has wrapped, chunks"),
        ("all_to_all:dedup", "option 'dedup' in 'all_to_all:dedup' must read option=value"),
        ("group_wise:chunked", "wrapped='chunked': parts of the tokens need a plain dispatcher"),
    ],
)
def test_mistakes_in_a_dispatcher(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, dispatch=text)


@pytest.mark.parametrize("name", [n for n, kind in DISPATCHERS.items() if kind.needs_ranks])
def test_a_dispatcher_across_ranks_is_refused_on_one(name: str) -> None:
    config = MoEConfig(hidden_size=8, intermediate_size=4, num_experts=4, dispatch=name)
    with pytest.raises(ValueError, match=r"initialise a process group and call `MoE\.distribute`"):
        MoE(config)(torch.randn(3, 8))


def test_no_process_group() -> None:
    mesh: Any = None
    with pytest.raises(ValueError, match="before a process group is initialised"):
        ExpertParallel.create(mesh, Topology((0,)), 4)


def test_chunks_move_one_step_behind_each_other() -> None:
    log: list[str] = []

    def chunk(name: str, length: int) -> Any:
        for step in range(length):
            log.append(f"{name}{step}")
            yield
        return torch.tensor(float(length))

    assert torch.equal(
        torch.stack(in_turns([chunk("a", 2), chunk("b", 1)])), torch.tensor([2.0, 1])
    )
    assert log == ["a0", "b0", "a1"]
