"""Experts spread over ranks: how a layer is divided among them."""

from __future__ import annotations

from torch import nn

from etr.moe.config import MoEConfig
from etr.moe.dispatch import DISPATCHERS, Dispatcher
from etr.moe.experts import EXPERT_BACKENDS, Bank
from etr.moe.ranks import ExpertParallel


def dispatcher_across(config: MoEConfig, parallel: ExpertParallel) -> Dispatcher:
    """The dispatcher that `config.dispatch` means on these ranks.

    Raises:
        ValueError: it, the backend, the bank, a loss or the number of experts does not go with
            them.
    """
    bank = config.bank_config
    if bank.undivided is not None:
        raise ValueError(
            f"experts={bank.name!r} cannot be divided among ranks: {bank.undivided}; use 'uniform' "
            "or 'nulls', or train on one process"
        )
    if config.inner_steps > 1:
        raise ValueError(
            f"inner_steps={config.inner_steps}: experts that a layer runs again cannot be divided "
            "among ranks; train on one process"
        )
    if parallel.expert_peers.size > 1:
        _check_losses(config)
    name = config.dispatch
    if name == "auto":
        alone = parallel.expert_peers.size == 1
        name = "permute" if alone else "all_to_all"
        name = name if parallel.tensor_group is None else "group_wise"
    dispatcher = DISPATCHERS.parse(name)
    dispatcher.check(parallel)
    fixed = config.backend != "auto" and EXPERT_BACKENDS[config.backend].padded
    if fixed and not dispatcher.padded:
        raise ValueError(
            f"backend={config.backend!r} takes buffers of a fixed capacity, and "
            f"dispatch={dispatcher.name!r} brings as many rows as there are; use a ragged backend "
            "('auto', 'loop', 'grouped_mm') or dispatch='all_to_all_padded'"
        )
    if parallel.placement.num_experts != config.num_experts:
        raise ValueError(
            f"num_experts={config.num_experts}, but the ranks were arranged for "
            f"{parallel.placement.num_experts}: call ExpertParallel.create with the layer's number"
        )
    return dispatcher


def _check_losses(config: MoEConfig) -> None:
    """Refuse what would lose a gradient: tokens meet this rank's experts alone in such a loss."""
    traits = config.router_config.traits
    for row in config.loss_rows:
        if row.needs_tokens and row.needs_experts and row.weight_for(traits):
            raise ValueError(
                f"loss {row.name!r} asks for tokens and experts' weights, and its gradient of the "
                "tokens would lack the experts of other ranks; divide no experts among ranks "
                "(expert_ranks=1), or give it weight 0"
            )


def shard_experts(bank: Bank, parallel: ExpertParallel) -> None:
    """Make every expert's weights in `bank` DTensors of which this rank holds its experts alone.

    The values must be the same on every rank beforehand, or on the meta device. What else is in a
    bank stays whole.

    Raises:
        ValueError: they are divided already.
    """
    from torch.distributed.tensor import DTensor, Shard

    for experts, (name, full) in [(part, own) for part in bank.parts for own in part.weights()]:
        if isinstance(full, DTensor):
            raise ValueError(f"experts.{name} is divided among ranks already; distribute once")
        own = full.detach().chunk(parallel.expert_peers.size)[parallel.expert_peers.rank].clone()
        value = DTensor.from_local(own, parallel.mesh, [Shard(0)], run_check=False)
        experts.register_parameter(name, nn.Parameter(value, requires_grad=full.requires_grad))
