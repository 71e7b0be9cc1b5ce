"""Expert and token similarity against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from etr import MoE, MoEConfig
from etr.diagnostics import expert_outputs, expert_similarity, token_correlation


def layer_and_tokens(activation: str = "swiglu") -> tuple[MoE, torch.Tensor]:
    torch.manual_seed(0)
    layer = MoE(
        MoEConfig(hidden_size=16, intermediate_size=12, num_experts=4, activation=activation)
    )
    return layer, torch.randn(9, 16)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
def test_outputs_are_those_of_every_expert(activation):
    layer, x = layer_and_tokens(activation)
    outputs = expert_outputs(layer, x)
    assert outputs.shape == (4, 9, 16)
    for expert in range(4):
        up = layer.experts.get_parameter(layer.experts.up_name)[expert]
        hidden = x @ up.T
        if activation == "swiglu":
            hidden = F.silu(hidden[:, :12]) * hidden[:, 12:]
        else:
            hidden = F.gelu(hidden) if activation == "gelu" else hidden.clamp_min(0) ** 2
        expected = hidden @ layer.experts.down_proj[expert].T
        torch.testing.assert_close(outputs[expert], expected)


def test_similarity_equals_plain_loops():
    outputs = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    found = expert_similarity(outputs)
    for a in range(3):
        for b in range(3):
            cosines = [
                float(p @ q / (p.norm() * q.norm()))
                for p, q in zip(outputs[a], outputs[b], strict=True)
            ]
            assert float(found[a, b]) == pytest.approx(sum(cosines) / 7, abs=1e-6)


def test_equal_opposite_and_silent_experts():
    first = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found = expert_similarity(torch.stack([first, 3 * first, -first, 0 * first]))
    expected = torch.tensor([[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(found, expected.double())
    assert not expert_similarity(torch.ones(2, 0, 4)).any()


def test_similarity_of_a_layer_falls_from_copies_to_strangers():
    layer, x = layer_and_tokens()
    with torch.no_grad():
        for weight in layer.experts.parameters():
            weight.copy_(weight[:1].expand_as(weight).clone())
    copies = expert_similarity(expert_outputs(layer, x))
    torch.testing.assert_close(copies, torch.ones(4, 4).double())
    layer.experts.reset_parameters()
    strangers = expert_similarity(expert_outputs(layer, x))
    assert strangers[0, 1:].abs().max() < 0.6


def test_correlation_equals_torch():
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(0)).double() * 5 + 7
    torch.testing.assert_close(token_correlation(x), torch.corrcoef(x))


def test_constant_and_single_tokens():
    x = torch.stack([torch.full((6,), 0.1), torch.arange(6.0), torch.zeros(6)])
    found = token_correlation(x)
    torch.testing.assert_close(found, torch.diag(torch.tensor([0.0, 1.0, 0.0])).double())
    torch.testing.assert_close(token_correlation(x[1:2]), torch.ones(1, 1).double())
    assert token_correlation(x[:0]).shape == (0, 0)
