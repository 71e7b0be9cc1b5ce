"""FusionRoute: the sum of two models' logits, its losses by hand, and small models of two texts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from etr.methods.fusion_route import FusionRoute, route_loss
from etr.model import COMPOSITIONS
from etr.model.composition import Phase, Seen
from etr.model.objective import IGNORED

METHOD = FusionRoute()
SFT, SUM, PREFERENCE = METHOD.phases


def wide(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def some(batch: int = 2, length: int = 5, members: int = 3, size: int = 7) -> Seen:
    """Random logits, log-probabilities and labels, float64."""
    said = torch.randn(batch, length, members, size, dtype=torch.float64).log_softmax(-1)
    return Seen(
        own=torch.randn(batch, length, size, dtype=torch.float64, requires_grad=True),
        choice=torch.randn(batch, length, members, dtype=torch.float64, requires_grad=True),
        members=said,
        labels=torch.randint(size, (batch, length)),
        before=torch.randn(batch, length, dtype=torch.float64),
    )


def gap(router: float, member: float) -> Seen:
    """One continuation of one token, whose router's log-ratio and member's log-probability are so.

    Both sum to a probability of 1 over two tokens, or near enough: only label 0 is asked.
    """
    own = wide([[[0.0, 0.0]]]).requires_grad_()
    before = own.detach().log_softmax(-1)[..., 0] - router
    members = wide([[[[member, 0.0]]]])
    return Seen(
        own=own,
        choice=wide([[[1.0]]]),
        members=members,
        labels=torch.zeros(1, 1).long(),
        before=before,
    )


def preferred(better: Seen, worse: Seen) -> Tensor:
    """The preference part of the third phase's loss."""
    text = some()
    rest = METHOD.loss(SUM, text, None) + route_loss(text)
    return METHOD.loss(PREFERENCE, text, (better, worse)) - rest


def check_worked_numbers() -> None:
    own, member = wide([[[0.6, 0.3, 0.1]]]).log(), wide([[[[0.2, 0.7, 0.1]]]]).log()
    found = METHOD.combine(own, wide([[[0.0]]]), member).softmax(-1)[0, 0]
    torch.testing.assert_close(found, wide([0.3529, 0.6176, 0.0294]), atol=1e-4, rtol=0)
    for member_gap, loss, factor in ((5.0, 0.4032, 0.3318), (-5.0, None, 0.5744)):
        better, worse = gap(2.0, member_gap), gap(0.0, 0.0)
        lost = preferred(better, worse)
        lost.backward()
        if loss is not None:
            assert lost.item() == pytest.approx(loss, abs=1e-4)
        # The log-probability of label 0 grows by half as much as its logit.
        assert better.own.grad is not None
        assert -better.own.grad[0, 0, 0].item() / 0.5 / 0.1 == pytest.approx(factor, abs=1e-4)


def check_zero_router() -> None:
    seen = some()
    picked = seen.members.gather(2, seen.choice.argmax(-1)[..., None, None].expand(-1, -1, 1, 7))
    found = METHOD.combine(torch.zeros_like(seen.own), seen.choice, seen.members)
    assert torch.equal(found.argmax(-1), picked[:, :, 0].argmax(-1))


def test_the_worked_numbers() -> None:
    check_worked_numbers()
    check_zero_router()


@pytest.mark.measured
@pytest.mark.criterion
def test_what_the_card_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the router's logits are 0, greedy text is the chosen member's, token for token; .6, .3,
    .1 and .2, .7, .1 make .3529, .6176, .0294; gaps of 2 and 5 lose .4032 at beta = 0.1, with
    gradient factor .3318, and 2 and -5 have factor .5744; and of models of code and of JSON the
    composed one, once trained on the sum, loses 0.02 nats less than the chosen members alone and 1
    nat less than the better model of the two, and 93 % of tokens or more go to the model of their
    text."""
    check_worked_numbers()
    check_zero_router()
    record = composed_of_code_and_json(tmp_path, monkeypatch, "preference_steps=0")
    losses = {name: found["all"] for name, found in record["held_out"].items()}
    print(losses, record["routed_to_best_of_domain"])
    assert losses["composed"] <= losses["chosen alone"] - 0.02
    assert losses["composed"] <= min(losses["code"], losses["json"]) - 1
    assert record["routed_to_best_of_domain"] >= 0.93


def composed_of_code_and_json(folder: Path, monkeypatch: pytest.MonkeyPatch, options: str) -> Any:
    """What `etr compose` notes of two models that `etr train` made."""
    pytest.importorskip("transformers")
    from toy_lm import corpus

    from etr.cli import main

    monkeypatch.chdir(folder)
    texts = corpus()
    for name, number in (("code", 0), ("json", 3)):
        text = bytes(torch.cat(texts[number]).tolist()).decode()
        Path(f"{name}.txt").write_text(text)
    common = (
        "--num-heads 4 --num-key-value-heads 4 --num-experts 1 --top-k 1 --router token_choice "
        "--capacity none --aux-alpha 0 --device cpu --cache-dir cache"
    )
    for name in ("code", "json"):
        train = (
            f"train --out {name} --data {name}.txt --hidden-size 48 --num-layers 2 "
            f"--expert-size 48 --steps 120 --batch-size 16 --sequence-length 64 --eval-every 120 "
            f"--no-diagnostics --profile-every None --eval-tokens-per-domain 512 {common}"
        )
        assert main(train.split()) == 0
    compose = (
        f"compose fusion_route:{options} code json --data code.txt json.txt --out both "
        f"--hidden-size 32 --num-layers 1 --expert-size 32 --batch-size 16 --sequence-length 64 "
        f"--prompt-length 32 {common}"
    )
    assert main(compose.split()) == 0
    return json.loads(Path("both/composition.json").read_text())


def test_phases_train_what_they_should() -> None:
    """The first both heads; the sum the router alone; the third both, the second head by text."""
    for phase, pair, both in ((SFT, None, True), (SUM, None, False)):
        seen = some()
        METHOD.loss(phase, seen, pair).backward()
        assert seen.own.grad is not None
        assert (seen.choice.grad is not None) == both
    seen, better, worse = some(), some(), some()
    METHOD.loss(PREFERENCE, seen, (better, worse)).backward()
    assert seen.choice.grad is not None
    assert better.choice.grad is worse.choice.grad is None
    for one, sign in ((better, -1), (worse, 1)):
        assert one.own.grad is not None
        assert torch.all(sign * one.own.grad.gather(-1, one.labels[..., None]) > 0)


def test_the_first_phase_is_both_losses_by_hand() -> None:
    """Whom to choose is learned where members' best tokens differ, and there alone."""
    seen = some()
    total, count, own = 0.0, 0, 0.0
    for row in range(2):
        for place in range(5):
            label = int(seen.labels[row, place])
            own -= float(seen.own[row, place].detach().log_softmax(-1)[label]) / 10
            said = seen.members[row, place]
            if len({int(one.argmax()) for one in said}) == 1:
                continue
            weight = seen.choice[row, place].detach().softmax(-1)
            summed = sum(w * one for w, one in zip(weight, said, strict=True))
            total, count = total - float(summed.log_softmax(-1)[label]), count + 1
    assert count > 0
    assert METHOD.loss(SFT, seen, None).item() == pytest.approx(own + total / count)
    half = FusionRoute(route_weight=0.5)
    assert half.loss(SFT, seen, None).item() == pytest.approx(own + 0.5 * total / count)
    same = Seen(
        own=seen.own,
        choice=seen.choice,
        members=seen.members[:, :, :1].expand(-1, -1, 3, -1),
        labels=seen.labels,
    )
    assert route_loss(same).item() == 0


def test_the_second_phase_is_the_likelihood_of_the_sum() -> None:
    seen = some()
    labels = seen.labels.clone()
    labels[0, :3] = IGNORED
    found = 0.0
    for row, place in (labels != IGNORED).nonzero().tolist():
        member = seen.members[row, place, int(seen.choice[row, place].argmax())]
        summed = (seen.own[row, place].softmax(-1) * member.exp()).detach()
        found -= math.log(float(summed[labels[row, place]] / summed.sum())) / 7
    asked = Seen(own=seen.own, choice=seen.choice, members=seen.members, labels=labels)
    assert METHOD.loss(SUM, asked, None).item() == pytest.approx(found)


def test_steps_and_rates_are_those_of_the_options() -> None:
    found = FusionRoute(sft_steps=1, sum_steps=2, preference_steps=3).phases
    assert found == (
        Phase(name="sft", steps=1, learning_rate=3e-3),
        Phase(name="sum", steps=2, learning_rate=1e-3),
        Phase(name="preference", steps=3, learning_rate=1e-4, pairs=True),
    )


@pytest.mark.parametrize(
    "option", ["sft_steps=-1", "sum_steps=x", "learning_rate=0", "route_weight=0", "beta=-1"]
)
def test_options_are_checked(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        COMPOSITIONS.parse(f"fusion_route:{option}")
