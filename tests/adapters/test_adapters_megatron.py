"""The plug-in against Megatron-Core's functions, and inside its MoELayer on four ranks."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core", reason="needs megatron-core: pip install 'etr-moe[megatron]'")
moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")

from etr.adapters import megatron_router  # noqa: E402
from etr.moe import LossConfig, MoE, MoEConfig  # noqa: E402
from etr.moe.config import parse_capacity  # noqa: E402

H, E, S, B, WORLD = 32, 8, 16, 2, 4


def settings(top_k: int, **changes) -> SimpleNamespace:
    """What the plug-in reads of a TransformerConfig."""
    values = {
        "hidden_size": H,
        "num_moe_experts": E,
        "moe_router_topk": top_k,
        "moe_expert_capacity_factor": 1.0,
        "moe_router_dtype": None,
        "sequence_parallel": False,
        "calculate_per_token_loss": False,
    }
    return SimpleNamespace(**(values | changes))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("factor", [0.25, 0.6, 1.1, 8.0])
def test_it_equals_megatrons_functions(top_k, factor):
    """Token top-k, then each expert's best choosers, which Megatron calls drop_policy="probs"."""
    build = megatron_router(
        "token_choice",
        f"factor:capacity_factor={factor}",
        rank_by="score",
        normalize="none",
        losses=LossConfig(aux_alpha=0.0),
    )
    router = build(config=settings(top_k)).double()
    x = torch.randn(S, B, H, dtype=torch.float64)
    probs, routing_map = router(x)
    logits = x.reshape(-1, H) @ router.router.moe.router.weight.double().T
    want, chosen = moe_utils.topk_routing_with_score_function(logits, top_k, use_pre_softmax=True)
    want, kept = moe_utils.apply_router_token_dropping(
        want, chosen, router_topk=top_k, capacity_factor=factor, drop_policy="probs"
    )
    assert torch.equal(routing_map, kept & (want > 0))
    torch.testing.assert_close(probs, want)


def test_the_balance_loss_has_megatrons_gradient_scale():
    build = megatron_router("token_choice", "none", losses=LossConfig(aux_alpha=0.01))
    router = build(config=settings(1)).double()
    moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(3.0))
    x = torch.randn(S, B, H, dtype=torch.float64)
    probs, _ = router(x)
    (probs * 0).sum().backward()
    weight = router.router.moe.router.weight
    loss = router.router(x.reshape(-1, H)).losses["aux"]
    (want,) = torch.autograd.grad(3.0 * loss, weight)
    torch.testing.assert_close(weight.grad, want)
    moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))


def test_dropping_needs_a_dispatcher_that_counts():
    with pytest.raises(ValueError, match="moe_expert_capacity_factor"):
        megatron_router()(config=settings(1, moe_expert_capacity_factor=None))
    megatron_router(capacity="none")(config=settings(1, moe_expert_capacity_factor=None))


def worker(rank: int, folder: str) -> None:
    """One rank of Megatron-Core's MoELayer with experts over four ranks, against our layer."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    from megatron_stubs import stub_cuda

    stub_cuda()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: F401
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    parallel_state.initialize_model_parallel(expert_model_parallel_size=WORLD)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=4,
        num_moe_experts=E,
        moe_router_topk=2,
        moe_ffn_hidden_size=24,
        expert_model_parallel_size=WORLD,
        moe_token_dispatcher_type="alltoall",
        moe_expert_capacity_factor=1.0,
        moe_aux_loss_coeff=0.0,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bf16=False,
        params_dtype=torch.float32,
    )
    capacity = "factor:capacity_factor=0.6"
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = MoELayer(
        config,
        MoESubmodules(
            router=megatron_router("etr", capacity, losses=LossConfig(aux_alpha=0.0)),
            experts=ModuleSpec(module=SequentialMLP, submodules=linear),
        ),
        layer_number=1,
    )
    torch.manual_seed(7)
    ours = MoE(
        MoEConfig(
            hidden_size=H,
            intermediate_size=24,
            num_experts=E,
            top_k=2,
            router="etr",
            capacity=parse_capacity(capacity),
            losses=LossConfig(aux_alpha=0.0),
        )
    )
    layer.router.router.moe.router.load_state_dict(ours.router.state_dict())
    params = ours.experts.params(torch.float32)
    per_rank = E // WORLD
    with torch.no_grad():
        for local, expert in enumerate(layer.experts.local_experts):
            expert.linear_fc1.weight.copy_(params.up[rank * per_rank + local])
            expert.linear_fc2.weight.copy_(params.down[rank * per_rank + local])
    torch.manual_seed(100 + rank)
    x = torch.randn(S, B, H, requires_grad=True)
    y, _ = layer(x)
    y.square().sum().backward()
    again = x.detach().clone().requires_grad_()
    want = ours(again).hidden_states
    want.square().sum().backward()
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-5)
    kept = layer.router(x)[1].sum()
    torch.save({"kept": int(kept), "pairs": S * B * 2}, f"{folder}/done-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.slow
def test_four_ranks_of_megatrons_layer_equal_ours(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=WORLD)
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"done-{rank}.pt")
        assert 0 < found["kept"] < found["pairs"]
