"""Losses: one file each, one line each in `LOSSES`."""

from etr.moe.losses.balance import Balance, balance_loss
from etr.moe.losses.base import AuxMode, Loss, LossInput, even_losses, scaled_losses
from etr.moe.losses.locality import Locality, locality_loss, locality_target
from etr.moe.losses.means import mean_over_valid, sum_over_group, whole_over_group
from etr.moe.losses.pool import PoolBalance
from etr.moe.losses.rows import LOSSES, LossConfig, Losses, loss_rows, parse_losses, reweighted
from etr.moe.losses.z import Z, z_loss

__all__ = [
    "LOSSES",
    "AuxMode",
    "Balance",
    "Locality",
    "Loss",
    "LossConfig",
    "LossInput",
    "Losses",
    "PoolBalance",
    "Z",
    "balance_loss",
    "even_losses",
    "locality_loss",
    "locality_target",
    "loss_rows",
    "mean_over_valid",
    "parse_losses",
    "reweighted",
    "scaled_losses",
    "sum_over_group",
    "whole_over_group",
    "z_loss",
]
