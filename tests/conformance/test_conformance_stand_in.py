"""What stands in for experts that drop a token, beyond what every bank must do."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from cells import H, I, T, context, tokens, train_steps
from test_conformance_banks import layer_of
from test_conformance_reference import compare

from etr.data.tokenizer import byte_tokenizer
from etr.moe import MoE, moe_layers, selecting
from etr.train import ModelConfig, RoutingOptions
from etr.train.metrics import expert_flops
from etr.train.model import build_model


def filled(text: str = "stand_in:rank=3", router: str = "token_choice", **options: object) -> MoE:
    """A layer whose map is not the 0 that it starts from."""
    layer = layer_of(text, router, **options)
    with torch.no_grad():
        for value in layer.experts.stand_in.parameters():
            value.normal_()
    return layer


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("normalize", ["none", "chosen", "kept"])
@pytest.mark.parametrize("router", ["token_choice", "etr", "expert_choice"])
def test_values_and_gradients_of_a_trained_map_are_those_of_plain_loops(
    router: str, normalize: str, rank: int
) -> None:
    own = None if router == "expert_choice" else normalize
    layer = filled(f"stand_in:rank={rank}", router, normalize=own)
    compare(layer, tokens(), context(valid_mask=torch.arange(T) != 3))


def test_a_worked_answer() -> None:
    """Gate .25 of a dropped choice, x = (1, 2), A picks x_1, B makes 3 of it y_0, b_1 = 1:
    .25 * (6, 1)."""
    layer = filled("stand_in:rank=1", capacity="factor:capacity_factor=0.6", top_k=1)
    bank, x = layer.experts, tokens(4)
    with torch.no_grad():
        for value in bank.parameters():
            value.zero_()
        bank.stand_in.down[0, 1] = bank.stand_in.bias[1] = 1.0
        bank.stand_in.up[0, 0] = 3.0
        layer.router.weight.zero_()  # all tokens choose expert 0, with a gate of a quarter
        x.zero_()
        x[:, 0], x[:, 1] = 1.0, 2.0
    y = layer(x, context(4)).hidden_states
    kept = int((y == 0).all(1).sum())
    assert 0 < kept < 4
    want = torch.zeros(H, dtype=x.dtype)
    want[0], want[1] = 1.5, 0.25
    for row in y[(y != 0).any(1)]:
        torch.testing.assert_close(row, want)


def test_at_first_and_where_nothing_is_dropped_it_is_the_uniform_bank_bit_for_bit() -> None:
    x = tokens()
    for capacity, make in (("factor:capacity_factor=0.6", layer_of), ("none", filled)):
        layer = make("stand_in", capacity=capacity)
        uniform = layer_of("uniform", capacity=capacity)
        uniform.load_state_dict(layer.state_dict(), strict=False)
        assert torch.equal(layer(x, context()).hidden_states, uniform(x, context()).hidden_states)


@pytest.mark.parametrize("policy", ["threshold", "dropless"])
def test_each_token_is_served_by_itself(policy: str) -> None:
    layer, x = filled(router="etr"), tokens()
    train_steps(layer)
    with selecting(layer.eval(), policy), torch.no_grad():
        whole = layer(x, context()).hidden_states
        ones = [layer(token[None], context(1)).hidden_states[0] for token in x]
    torch.testing.assert_close(torch.stack(ones), whole)
    assert (whole != layer_output_without(layer, x, policy)).any() == (policy == "threshold")


def layer_output_without(layer: MoE, x: torch.Tensor, policy: str) -> torch.Tensor:
    """What the layer would make if nothing stood in."""
    nothing = mock.patch.object(type(layer.experts), "idle", return_value=None)
    with selecting(layer, policy), torch.no_grad(), nothing:
        return layer(x, context()).hidden_states


def test_a_model_starts_as_one_of_equal_experts_does() -> None:
    sizes = {"hidden_size": H, "num_layers": 2, "num_heads": 2, "num_key_value_heads": 2}
    stood, plain = (
        build_model(
            ModelConfig(**sizes, routing=RoutingOptions(expert_size=I, experts=text)),
            byte_tokenizer(),
            8,
            seed=3,
        )
        for text in ("stand_in", "uniform")
    )
    values = dict(stood.named_parameters())
    for name, value in plain.named_parameters():
        assert torch.equal(value, values[name]), name
    for layer in moe_layers(stood):
        assert not layer.experts.stand_in.up.any()
        assert layer.experts.stand_in.down.any()


def test_what_every_token_costs_is_counted() -> None:
    routing = RoutingOptions(num_experts=4, expert_size=I, experts="stand_in:rank=3")
    sizes = ModelConfig(hidden_size=H, num_heads=2, num_key_value_heads=2, routing=routing)
    model = build_model(sizes, byte_tokenizer(), 8, seed=0)
    layer, *others = moe_layers(model)
    counts = {
        "num_tokens_per_expert": torch.tensor([1, 0, 2, 0]),
        "num_valid_tokens": torch.tensor(5),
    }
    want = 3 * 2 * (3 * 3 * H * I + 5 * 2 * 3 * H)
    assert expert_flops(model, [counts, *({} for _ in others)]) == want
    assert layer.bank.parameters_of_a_token(1) == 3 * H * I + 2 * 3 * H + H
