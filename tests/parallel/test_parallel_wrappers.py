"""A layer and a model inside torch's own wrappers, as a user writes it: two ranks train as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo_ranks import spawn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import MixtralConfig

from etr.hf import EtrConfig, EtrForCausalLM
from etr.moe import MoE, MoEConfig, RoutingContext, attach, moe_layers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless"),
]
H, ROWS, LENGTH, STEPS = 16, 4, 8, 2


class Net(nn.Module):
    """A bare layer, whose losses its user adds."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(H, H)
        # Dropless: a capacity would count the tokens of each rank by themselves.
        config = MoEConfig(
            hidden_size=H, intermediate_size=8, num_experts=4, top_k=2, capacity="none"
        )
        self.moe = MoE(config)

    def forward(self, x: Tensor, context: RoutingContext) -> Tensor:
        output = self.moe(self.first(x), context)
        return output.hidden_states.square().mean() + sum(output.losses.values())


class Layer:
    """What differs between the two: how to build, feed and wrap."""

    build = Net
    tolerance = 1e-12

    @staticmethod
    def loss(model: nn.Module, rows: slice, step: int, context: RoutingContext) -> Tensor:
        return model(_normal(step)[rows], context)

    @staticmethod
    def blocks(model: nn.Module) -> list[nn.Module]:
        return [model.moe]  # type: ignore[list-item]


class Model:
    tolerance = 1e-6  # transformers' norms are float32, and sums of it depend on the batch

    @staticmethod
    def build() -> EtrForCausalLM:
        base = MixtralConfig(
            vocab_size=32,
            hidden_size=H,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
        )
        return EtrForCausalLM(EtrConfig.from_base(base, capacity="none", top_k=2))

    @staticmethod
    def loss(model: nn.Module, rows: slice, step: int, context: RoutingContext) -> Tensor:
        ids = torch.randint(32, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
        return model(input_ids=ids[rows], labels=ids[rows], routing_context=context).loss

    @staticmethod
    def blocks(model: nn.Module) -> list[nn.Module]:
        return list(model.model.layers)  # type: ignore[union-attr, arg-type]


def _normal(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, LENGTH, H, generator=generator, dtype=torch.float64)


def by_fsdp2(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    for block in (*blocks, model):
        fully_shard(block)
    return model


def by_fsdp1(model: nn.Module, blocks: list[nn.Module], **options: Any) -> nn.Module:
    kinds = {type(block) for block in blocks}
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=lambda module, recurse, **_: recurse or type(module) in kinds,
        device_id=torch.device("cpu"),
        **options,
    )


BODIES: dict[str, Any] = {"layer": Layer, "model": Model}
WRAPPERS: dict[str, Callable[[nn.Module, list[nn.Module]], nn.Module]] = {
    "ddp": lambda model, blocks: DistributedDataParallel(model),
    "fsdp1": by_fsdp1,
    "fsdp1 of parameters": lambda *given: by_fsdp1(*given, use_orig_params=True),
    "fsdp2": by_fsdp2,
}


def start(body: Any) -> nn.Module:
    torch.manual_seed(0)
    return body.build().double().train()


def trained(
    body: Any, wrap: Callable[..., nn.Module], folder: Path | None
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the whole state dict after two steps; in parts it goes to `folder`."""
    group = dist.group.WORLD if dist.is_initialized() else None
    rank, size = (dist.get_rank(), dist.get_world_size()) if group else (0, 1)
    model = start(body)
    wrapped = wrap(model, body.blocks(model))
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.5)  # errors of scale show, unlike Adam's
    attach(wrapped, optimizer, STEPS, group=group)
    context = RoutingContext(data_group=group)
    rows = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    losses = []
    for step in range(STEPS):
        loss = body.loss(wrapped, rows, step, context)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if folder is not None:
        dcp.save(get_model_state_dict(wrapped), checkpoint_id=folder)
    whole = StateDictOptions(full_state_dict=True)
    return losses, {k: v.clone() for k, v in get_model_state_dict(wrapped, options=whole).items()}


def work(folder: str) -> dict[str, Any]:
    found = {}
    for body in BODIES:
        for name, wrap in WRAPPERS.items():
            into = Path(folder) / f"{body}-{name}"
            found[f"{body}-{name}"] = trained(BODIES[body], wrap, into)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrappers")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return spawn(2, work, folder / "ranks", str(folder))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("body", BODIES)
def test_two_ranks_train_as_one(
    body: str, wrapper: str, folder: Path, ranks: list[dict[str, Any]]
) -> None:
    losses, want = trained(BODIES[body], lambda model, blocks: model, None)
    tolerance = BODIES[body].tolerance
    found = [rank[f"{body}-{wrapper}"] for rank in ranks]
    for mine, *theirs in zip(losses, *(losses for losses, _ in found), strict=True):
        assert sum(theirs) / 2 == pytest.approx(mine, rel=tolerance)
    loaded = start(BODIES[body]).state_dict()
    dcp.load(loaded, checkpoint_id=folder / f"{body}-{wrapper}", no_dist=True)
    for got in (found[0][1], found[1][1], loaded):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert got[name].shape == value.shape, name
            torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance, msg=name)
    assert all(int(value) == STEPS for name, value in want.items() if name.endswith("state.step"))
    assert sum(name.endswith("state.step") for name in want) == len(moe_layers(start(BODIES[body])))
