"""Tasks: the same seed gives the same work; the pieces are what they say."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from etr.moe import moe_layers
from etr.study.probe import evaluate
from etr.study.tasks import TASKS, open_task
from etr.train import TrainConfig, parse_variant
from etr.train.tasks.teacher import NUM_DOMAINS, Teacher, TeacherTask
from etr.train.tasks.text_x import WINDOW


def tiny(name: str, variant: str = "token_choice/rank_by=score", seed: int = 3) -> TrainConfig:
    shared = TASKS[name].config(4)
    return parse_variant(variant).apply(dataclasses.replace(shared, seed=seed))


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_batches_and_the_same_start(name: str) -> None:
    config = tiny(name)
    task = open_task(name, TASKS[name].config(1))
    losses = []
    for variant in ("token_choice/rank_by=score", "token_choice/rank_by=score", "etr_paper"):
        config = tiny(name, variant)
        model = task.build(config).train()
        batch = next(iter(task.training_batches(config)))
        found = task.forward(model, batch)
        experts = torch.cat(
            [p.flatten() for x in moe_layers(model) for p in x.experts.parameters()]
        )
        losses.append((float(found.token_losses.detach().mean()), experts))
    assert losses[0][0] == losses[1][0]
    for _, experts in losses[1:]:
        assert torch.equal(experts, losses[0][1])  # a router takes no random numbers of others


@pytest.mark.parametrize("name", TASKS)
def test_another_seed_is_another_run(name: str) -> None:
    task = open_task(name, TASKS[name].config(1))
    losses = set()
    for seed in (3, 4):
        config = tiny(name, seed=seed)
        model = task.build(config).train()
        found = task.forward(model, next(iter(task.training_batches(config))))
        losses.add(float(found.token_losses.detach().mean()))
    assert len(losses) == 2


@pytest.mark.parametrize("name", ["text-x", "teacher-50", "lm"])
def test_every_parameter_learns(name: str) -> None:
    task = open_task(name, TASKS[name].config(1))
    config = tiny(name)
    model = task.build(config).train()
    found = task.forward(model, next(iter(task.training_batches(config))))
    torch.stack([found.token_losses.mean(), *found.router_losses.values()]).sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_text_x_is_causal_and_sees_its_window() -> None:
    name = "text-x"
    task = open_task(name, TASKS[name].config(1))
    model = task.build(tiny(name, "token_choice/rank_by=score/capacity=none")).eval()
    ids = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 256
    with torch.no_grad():
        a, b = model(input_ids=ids).logits, model(input_ids=changed).logits
    torch.testing.assert_close(a[0, :20], b[0, :20])
    moved = (a[0, 20 : 20 + WINDOW] - b[0, 20 : 20 + WINDOW]).abs().amax(-1)
    assert bool((moved > 1e-4).all())


def test_a_teacher_has_the_promised_share_of_easy_tokens() -> None:
    teacher = Teacher(16, 0.7, seed=1)
    batch = teacher.sample(20_000, torch.Generator().manual_seed(2))
    assert abs(float((batch.domain == 0).float().mean()) - 0.7) < 0.02
    assert set(batch.domain.tolist()) == set(range(NUM_DOMAINS + 1))
    assert abs(float(batch.target.std()) - 1) < 0.05
    easy = batch.domain == 0
    # A linear map explains easy tokens exactly, and hard ones not.
    x = torch.cat([batch.x, torch.ones(len(batch.x), 1)], 1).double()
    for rows, low, high in ((easy, 0.0, 1e-6), (~easy, 0.05, 9.0)):
        left = x[rows] @ torch.linalg.lstsq(x[rows], batch.target[rows].double()).solution
        error = float((left - batch.target[rows]).square().mean())
        assert low <= error < high


def test_a_share_of_easy_tokens_outside_its_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"easy=1\.0"):
        TeacherTask(easy=1.0)


def test_the_probe_divides_the_loss_among_documents() -> None:
    task = open_task("text-x", TASKS["text-x"].config(1))
    config = tiny("text-x")
    documents = task.documents(config)
    found = evaluate(task, task.build(config), task.held_out_batches(config), "dropless", documents)
    parts = found.documents
    assert len(parts["tokens"]) == len(documents[documents >= 0].unique()) > len(task.domains)
    total = sum(t * loss for t, loss in zip(parts["tokens"], parts["loss"], strict=True))
    assert total / sum(parts["tokens"]) == pytest.approx(found.loss, abs=1e-5)
    for place, name in enumerate(task.domains):
        own = [i for i, d in enumerate(parts["domain"]) if d == place]
        mean = sum(parts["tokens"][i] * parts["loss"][i] for i in own)
        mean /= sum(parts["tokens"][i] for i in own)
        assert mean == pytest.approx(found.loss_by_domain[name], abs=1e-5)


def test_the_probe_reads_losses_and_kept_tokens() -> None:
    name = "teacher-50"
    task = open_task(name, TASKS[name].config(1))
    config = tiny(name, "token_choice/rank_by=score/capacity=factor:capacity_factor=0.5")
    model = task.build(config)
    batches = list(itertools.islice(task.held_out_batches(config), 2))
    found = evaluate(task, model, batches, "dropless")
    assert found.kept_per_token == 1.0
    assert found.dropped_share == 0.0
    assert found.dropped_loss is None
    assert model.training
    with torch.no_grad():
        model.eval()
        for layer in moe_layers(model):
            layer.eval_selection = "dropless"
        by_hand = torch.cat([task.forward(model, batch).token_losses for batch in batches])
    assert found.loss == pytest.approx(float(by_hand.double().mean()), rel=1e-6)
