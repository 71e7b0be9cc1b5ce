"""Expert Threshold: running cutoffs of logits, one rule in training and serving."""

from __future__ import annotations

import pytest
import torch
from decisions import decide, layer_of, learn
from torch import Tensor
from toys import Net, Toy, error, train

from etr.methods.expert_threshold import Cutoffs
from etr.moe import Collector, MoE, after_step
from etr.moe.learner import Step

COLUMNS = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 2.0, 1.0, 3.0]])


def worked(text: str = "decay=0.9,warmup=0") -> tuple[MoE, Tensor]:
    """Two experts with cutoffs 1.5 and 2.5, and four tokens."""
    router = f"expert_threshold:{text}"
    layer = layer_of("expert_threshold", router=router, num_experts=2).double()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2, 16))
        layer.router.cutoffs.mean.copy_(torch.tensor([1.5, 2.5]))
        layer.router.cutoffs.num_updates.fill_(1000)
    x = torch.zeros(4, 16, dtype=torch.float64)
    x[:, :2] = COLUMNS.T
    return layer, x


def taken(layer: MoE, x: Tensor) -> list[list[int]]:
    """Which tokens each expert takes."""
    return decide(layer, x).routing.routing_map().int().T.tolist()


def test_worked_choices_and_cutoffs() -> None:
    layer, x = worked()
    for training in (True, False):
        assert taken(layer.train(training), x) == [[1, 0, 1, 0], [0, 0, 0, 1]]
    learn(layer, x)
    assert layer.router.cutoffs.values().tolist() == [1.5, 2.5]  # frozen in eval
    learn(layer.train(), x)
    assert layer.router.cutoffs.values().tolist() == pytest.approx([1.55, 2.45], abs=1e-6)


def test_the_first_step_is_a_cutoff_at_once() -> None:
    layer, x = worked()
    layer.router.cutoffs.reset_state()
    assert taken(layer, x) == [[1, 1, 1, 0], [0, 1, 1, 1]]  # a cutoff of 0
    assert taken(layer.eval(), x) == [[1, 0, 1, 0], [0, 1, 0, 1]]  # each token's best
    learn(layer.train(), x)
    assert layer.router.cutoffs.values().tolist() == pytest.approx([2.0, 2.0])


def test_in_the_warm_up_experts_take_their_best_of_the_batch() -> None:
    layer, x = worked("decay=0.9,warmup=2")
    assert taken(layer, x) == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert taken(layer.eval(), x) == [[1, 0, 1, 0], [0, 0, 0, 1]]  # served by cutoffs all along
    layer.train()
    for _ in range(2):
        learn(layer, x)
    assert taken(layer, x)[1] == [0, 0, 0, 1]


def test_weights_are_sigmoids_beside_a_shared_expert() -> None:
    """Against plain loops, values and gradients."""
    layer, _ = worked()
    x = 2 * torch.randn(6, 16, dtype=torch.float64)
    bare = layer_of("expert_threshold", router="expert_threshold:warmup=0", num_experts=2)
    assert layer.shared_experts is not None
    bare = bare.double()
    bare.load_state_dict(layer.state_dict())
    bare.shared_experts = None
    experts, w = layer.experts.params(torch.float64), layer.router.weight
    rows = []
    for token in x:
        total = torch.zeros(16, dtype=torch.float64)
        for e, cutoff in enumerate((1.5, 2.5)):
            logit = w[e] @ token
            if float(logit.detach()) > cutoff:
                half = experts.up[e] @ token
                hidden = torch.nn.functional.silu(half[:8]) * half[8:]
                total = total + logit.sigmoid() * (experts.down[e] @ hidden)
        rows.append(total)
    shared = layer.shared_experts(x, x.dtype, lambda x, p: [p.up[0], p.down[0]])
    halves = x @ shared[0].T
    hidden = torch.nn.functional.silu(halves[:, :8]) * halves[:, 8:]
    want = torch.stack(rows) + hidden @ shared[1].T
    found = layer(x).hidden_states
    torch.testing.assert_close(found, want)
    assert any(not row.any() for row in rows)
    probe = torch.randn_like(want)
    (got,) = torch.autograd.grad((found * probe).sum(), w)
    (right,) = torch.autograd.grad((want * probe).sum(), w)
    torch.testing.assert_close(got, right)


def changed(layer: MoE) -> int:
    """How many of 32 x 8 earlier choices change with the tokens after them."""
    x = torch.randn(64, 16)
    later = x.clone()
    later[32:] *= 5
    maps = [decide(layer, tokens).routing.routing_map()[:32] for tokens in (x, later)]
    return int((maps[0] != maps[1]).sum())


def test_later_tokens_change_nothing_but_in_the_warm_up() -> None:
    for text, leaks in (("warmup=0", False), ("warmup=9", True)):
        layer = layer_of("expert_threshold", router=f"expert_threshold:{text}", num_experts=8)
        assert layer.traits.causal != leaks
        learn(layer, torch.randn(64, 16))
        assert (changed(layer) > 0) == leaks
        assert changed(layer.eval()) == 0


def test_a_cutoff_10_too_high_comes_down_over_all_tokens() -> None:
    """A tenth of the decay's time: 282 steps at 0.99 on 256 normal logits of which 32 should do."""
    cutoffs = Cutoffs(1, 0.99)
    cutoffs.mean.fill_(11.15)
    cutoffs.num_updates.fill_(10_000)
    steps = 0
    while True:
        logits = torch.randn(256)
        steps += 1
        if int((logits > cutoffs.values()).sum()) >= 16:
            break
        found = {
            "least_logits": 256 * logits.topk(32).values[-1:].double(),
            "num_valid_tokens": torch.tensor(256),
        }
        cutoffs.after_step(
            Step(counters=found, layers=[], affinity_p99=logits[0], number=torch.tensor(1))
        )
    assert 200 < steps < 330


def test_micro_batches_are_averaged_and_empty_ones_count_for_nothing() -> None:
    layer, x = worked()
    other, _ = worked()
    for tokens in (x, 2 * x, x[:0]):
        with Collector(layer):
            layer(tokens)
    after_step(layer)
    learn(other, 1.5 * x)
    torch.testing.assert_close(layer.router.cutoffs.values(), other.router.cutoffs.values())
    before = layer.router.cutoffs.mean.clone()
    learn(layer, x[:0])
    assert torch.equal(layer.router.cutoffs.mean, before)
    assert int(layer.router.cutoffs.num_updates) == 1001


@pytest.mark.measured
@pytest.mark.criterion
def test_causal_and_better_after_a_warm_up() -> None:
    """After the warm-up, changing later tokens changes no earlier choice; on clustered tokens 200
    steps of it give a lower error after 800 than none, and every expert's load is 0.5 to 1.7 of the
    mean."""
    for seed in range(3):
        found = []
        for warmup in (200, 0):
            torch.manual_seed(seed)
            text = f"expert_threshold:decay=0.99,warmup={warmup}"
            model = Net("expert_threshold", router=text)
            train(model, Toy(seed, zipf=True), 800)
            found.append(error(model, Toy(seed, zipf=True)))
            layer = model.layers[0]
            assert changed(layer) == 0
            x, _, _ = Toy(seed, zipf=True).draw(16384, torch.Generator().manual_seed(seed))
            load = decide(layer, x).routing.num_choices_per_expert() / (16384 / 8)
            if warmup:
                assert load.min() >= 0.5, load
                assert load.max() <= 1.7, load
        print(seed, found)
        assert found[0] < found[1]
