"""Least-loaded expert parallelism: the plan, and 4 ranks that lend each other experts.

tests/distributed holds the dispatcher to one rank on every layout, as it does all of them.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from etr.methods import least_loaded
from etr.methods.least_loaded import spill
from etr.moe import ExpertParallel, MoE, MoEConfig, Topology
from etr.moe.dispatch import DISPATCHERS, all_to_all

SIZES = (7, 0, 13, 8)
"""Tokens of each rank."""
TOKENS = 64
"""Tokens of each rank whose memory is counted."""
DISPATCHES = ("all_to_all", "least_loaded", "least_loaded:alpha=1.5,chunk=3")


def layer(dispatch: str) -> MoE:
    """Eight experts of which every token whose first number is large wants the first."""
    torch.manual_seed(3)
    config = MoEConfig(
        hidden_size=16,
        intermediate_size=8,
        num_experts=8,
        top_k=1,
        router="token_choice",
        capacity="none",
        expert_bias=True,
        dispatch=dispatch,
    )
    found = MoE(config).double()
    with torch.no_grad():
        found.router.weight[:, 0] = torch.tensor([3.0, *([-3.0] * 7)])
    return found


def on_rank() -> dict[str, Any]:
    """Output, gradients and rows that ran here, by dispatcher."""
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("expert",))
    parallel = ExpertParallel.create(mesh, Topology((0, 0, 1, 1)), 8)
    ran: list[int] = []
    plain = all_to_all.by_expert

    def counted(arriving: torch.Tensor, rows: torch.Tensor) -> Any:
        ran.append(len(rows))
        return plain(arriving, rows)

    all_to_all.by_expert = least_loaded.by_expert = counted
    found: dict[str, Any] = {}
    for name in DISPATCHES:
        generator = torch.Generator().manual_seed(5)
        x, push = torch.randn(2, sum(SIZES), 16, dtype=torch.float64, generator=generator)
        x[:, 0] = 9.0
        x, push = (value.split(SIZES)[rank] for value in (x, push))
        x = x.clone().requires_grad_()
        one = layer(name).distribute(parallel)
        output = one(x)
        ((output.hidden_states * push).sum() + sum(output.losses.values()) / 4).backward()
        values = {"y": output.hidden_states.detach(), "x": x.grad}
        for key, weight in one.named_parameters():
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            values[key] = grad.to_local() if hasattr(grad, "to_local") else grad
        found[name] = values
    found["ran"] = list(ran)
    found["saved"] = {name: saved(layer(name).distribute(parallel)) for name in DISPATCHES}
    return found


def saved(one: MoE) -> int:
    """Bytes that a forward keeps for its backward, where all tokens of a long batch take one
    expert; each part of memory once, and no weight that is the layer's own."""
    x = torch.ones(TOKENS, 16, dtype=torch.float64)
    x[:, 0] = 9.0
    own = {w.to_local() if hasattr(w, "to_local") else w for w in one.parameters()}
    own = {weight.untyped_storage().data_ptr() for weight in own}
    kept: dict[int, int] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        output = one(x.requires_grad_())
    assert output.hidden_states.requires_grad
    return sum(kept.values())


@pytest.mark.distributed
@pytest.mark.criterion
def test_a_burst_is_spread_and_changes_nothing(tmp_path: Path) -> None:
    """Where all tokens of 4 ranks take one expert, no rank runs more than its mean share of rows
    (alpha = 1), and outputs and gradients are those of plain expert parallelism within 1e-9."""
    from gloo_ranks import spawn  # stands above the tests of methods

    ranks = spawn(4, on_rank, tmp_path / "ranks")
    plain, spread, capped = zip(*(rank["ran"] for rank in ranks), strict=True)
    assert plain == (28, 0, 0, 0)  # all rows are the first rank's
    assert spread == (7, 7, 7, 7)
    assert max(capped) <= math.ceil(1.5 * 7)
    # A rank keeps what one of evenly loaded ranks does, and the weights of its two experts and a
    # guest; three numbers a row say where rows go.
    plain, spread, _ = zip(*(rank.pop("saved").values() for rank in ranks), strict=True)
    weights = 3 * 8 * sum(value[0].numel() for value in layer("least_loaded").experts.parameters())
    assert max(spread) <= sum(plain) / 4 + weights + 3 * 8 * TOKENS < 0.6 * max(plain)
    for rank in ranks:
        want = rank.pop("all_to_all")
        for name in ("least_loaded", "least_loaded:alpha=1.5,chunk=3"):
            assert rank[name].keys() == want.keys()
            for key, value in want.items():
                torch.testing.assert_close(rank[name][key], value, rtol=1e-9, atol=1e-9)
    assert ranks[0]["least_loaded"]["experts.gate_up_proj"].abs().sum() > 0


def test_worked_example() -> None:
    """Loads 10, 2, 1, 3 at home on 2 ranks: 6 + 4 with a cap of 8, 8 + 2 with one of 10."""
    assert spill([10, 2, 1, 3], 2) == [[6, 4], [2, 0], [0, 1], [0, 3]]
    assert spill([10, 2, 1, 3], 2, alpha=1.25) == [[8, 2], [2, 0], [0, 1], [0, 3]]


def test_plans_keep_their_promise() -> None:
    """Every token runs once; no rank exceeds the cap; what fits at home stays there."""
    draw = random.Random(0)
    for _ in range(200):
        ranks = draw.choice((1, 2, 4))
        loads = [draw.choice((0, 1, 5, 40)) * draw.randrange(3) for _ in range(2 * ranks)]
        alpha = draw.choice((1.0, 1.2, 3.0))
        cap = math.ceil(alpha * sum(loads) / ranks - 1e-6)
        plan = spill(loads, ranks, alpha)
        assert [sum(shares) for shares in plan] == loads
        load = [sum(shares[rank] for shares in plan) for rank in range(ranks)]
        assert max(load) <= cap
        at_home = [sum(loads[2 * rank : 2 * rank + 2]) for rank in range(ranks)]
        if max(at_home) <= cap:
            assert all(shares[e // 2] == loads[e] for e, shares in enumerate(plan))


def test_small_chunks_are_not_lent() -> None:
    """But all that is left is, however little; where no rank has room for a chunk, the least loaded
    one takes the rest."""
    assert spill([9, 0, 3, 3], 2, chunk=3) == [[8, 1], [0, 0], [0, 3], [0, 3]]
    shares = spill([16, 0, 3, 0, 3, 0, 2, 0], 4, chunk=4)  # a cap of 6, and room for 3, 3 and 4
    assert shares[0] == [6, 6, 0, 4]
    assert spill([16, 0, 3, 0, 3, 0, 2, 0], 4)[0] == [6, 3, 3, 4]


@pytest.mark.parametrize("option", ["alpha=0.5", "chunk=0"])
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        DISPATCHERS.parse(f"least_loaded:{option}")
