"""Learning to predict as a teacher does: what trains, what is measured, what is refused."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig

from etr.data import BYTE_VOCAB_SIZE, DataConfig, OpenedData
from etr.hf import EtrConfig, EtrForCausalLM
from etr.model import Causal
from etr.model.objective import Text, draws
from etr.moe import moe_layers
from etr.train.recover import RecoverConfig
from etr.train.teach import Imitation, experts_alone, teach

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
SIZES = {
    "vocab_size": BYTE_VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def model_of(experts: str = "uniform", **sizes: int) -> EtrForCausalLM:
    torch.manual_seed(0)
    base = MixtralConfig(**{**SIZES, "num_local_experts": 4, **sizes})
    options = {"capacity": "none", "experts": experts}
    return EtrForCausalLM(EtrConfig.from_base(base, "token_choice", **options)).eval()


def config(data: DataConfig, **changes: Any) -> RecoverConfig:
    values: dict[str, Any] = {"steps": 30, "eval_tokens_per_domain": 256}
    return RecoverConfig(data=data, **{**values, **changes})


def test_experts_alone_learn_to_predict_as_the_teacher(
    data: OpenedData, data_config: DataConfig
) -> None:
    """A model whose experts were spoiled comes nearer to what it was."""
    teacher = model_of()
    model = copy.deepcopy(teacher)
    for layer in moe_layers(model):
        layer.experts.down_proj.data *= 0.2
    old = {name: value.clone() for name, value in model.named_parameters()}
    words: list[str] = []
    found = teach(
        model, teacher, data, config(data_config), Causal(), lambda step, said: words.append(said)
    )
    assert len(words) == len(found.imitation) == 30
    assert words[-1] == f"imitation {found.imitation[-1]:.3f}"
    assert list(found.results) == ["teacher", "before", "after"]
    assert sum(found.imitation[-5:]) < sum(found.imitation[:5])
    assert not model.training
    for name, value in model.named_parameters():
        assert torch.equal(value, old[name]) == (".experts." not in name), name
        assert value.requires_grad
        assert value.grad is None
    for layer in moe_layers(model):
        assert layer.attachment is None
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["results"]["after"]["loss"] == found.results["after"].loss


def test_bits_are_counted_and_fall_with_alpha(data: OpenedData, data_config: DataConfig) -> None:
    teacher, bits = model_of(), []
    for alpha in (0.0, 1.0):
        model = model_of(f"routed_bits:alpha={alpha},group=16")
        for layer in moe_layers(model):
            layer.experts.reset_parameters()
        found = teach(model, teacher, data, config(data_config, learning_rate=0.05), Causal())
        before, after = (found.results[name].counted for name in ("before", "after"))
        assert before == {"bits a weight": 4.0}
        assert found.results["teacher"].counted == {}
        bits.append(after["bits a weight"])
    assert bits[1] < bits[0] <= 4


def test_no_step_changes_nothing(data: OpenedData, data_config: DataConfig) -> None:
    model = model_of()
    found = teach(model, model, data, config(data_config, steps=0), Causal())
    assert found.imitation == ()
    assert len({result.loss for result in found.results.values()}) == 1


def test_imitation_by_hand() -> None:
    """Cross-entropy of two distributions where something is asked, also of a dense teacher."""
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    ids = torch.randint(BYTE_VOCAB_SIZE, (2, 5))
    following = torch.full_like(ids, -100)
    following[0, :3] = ids[0, 1:4]
    objective = Imitation(teacher, Causal())
    example = objective.example(Text(ids=ids, following=following), draws(0))
    logits = torch.randn(2, 5, BYTE_VOCAB_SIZE)
    found = objective.losses(logits, example).view(2, 5)
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits.softmax(-1)
    want = -(wanted * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(found[0, :3], want[0, :3])
    assert not found[0, 3:].any()
    assert not found[1].any()
    own = objective.losses(teacher(input_ids=ids).logits.detach(), example).sum()
    entropy = -(wanted * wanted.log())[0, :3].sum()
    assert math.isclose(float(own), float(entropy), rel_tol=1e-5)


def test_what_cannot_be_taught_is_refused(data: OpenedData, data_config: DataConfig) -> None:
    with pytest.raises(ValueError, match="the teacher has a vocabulary of 7 tokens"):
        teach(model_of(), model_of(vocab_size=7), data, config(data_config), Causal())
    with (
        pytest.raises(ValueError, match="hold nothing that can be trained"),
        experts_alone(model_of("nested:group=16")),
    ):
        pass
