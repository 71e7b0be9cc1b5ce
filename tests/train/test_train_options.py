"""Every option of a layer is an option of a run, and runs of before go on."""

from __future__ import annotations

import dataclasses

import pytest

from etr.cli._options import parse
from etr.moe import LossConfig
from etr.moe.options import OPTIONS
from etr.train import RoutingOptions, TrainConfig, checkpoint, train
from etr.train.checkpoint_folder import read_state
from etr.train.variants import parse_variant


def test_runs_have_every_option_of_a_layer():
    assert set(OPTIONS) < {field.name for field in dataclasses.fields(RoutingOptions)}
    routing = parse(
        TrainConfig,
        "train",
        ["--routed-scale", "2", "--num-shared-experts", "1", "--shared-gate", "--losses", "z"],
    ).model.routing
    assert (routing.routed_scale, routing.shared_gate) == (2.0, True)
    assert [row.name for row in routing.loss_rows] == ["z"]


def test_losses_as_text_are_a_field_of_a_variant():
    variant = parse_variant("a=etr/losses=balance:mode=running,z:weight=0.1/top_k=2")
    routing = variant.apply(TrainConfig()).model.routing
    assert routing.losses == LossConfig(losses="balance:mode=running,z:weight=0.1")
    assert routing.top_k == 2
    assert variant.apply(TrainConfig()).model.moe_config().loss_weights == {
        "balance": 0.01,
        "z": 0.1,
    }
    with pytest.raises(ValueError, match=r"variant 'etr/losses=y': loss='y' is unknown"):
        parse_variant("etr/losses=y")


def test_a_run_from_before_an_option_goes_on_at_its_default(make_config, data, monkeypatch):
    config = make_config("token_choice", steps=2, diagnostics=False, profile_every=None)
    train(config, data=data)
    new = "model.routing.routed_scale"
    assert config.fingerprint()[new] == 1.0

    def older(path):
        state = read_state(path)
        kept = {name: value for name, value in state.fingerprint.items() if name != new}
        return dataclasses.replace(state, fingerprint=kept)

    monkeypatch.setattr(checkpoint, "read_state", older)
    more = dataclasses.replace(config, steps=3, resume=True)
    assert train(more, data=data).steps == 3
    routing = dataclasses.replace(config.model.routing, routed_scale=2.0)
    model = dataclasses.replace(config.model, routing=routing)
    with pytest.raises(ValueError, match=rf"{new} is 1\.0 there and 2\.0 here"):
        train(dataclasses.replace(more, steps=4, model=model), data=data)
