"""Many ranks against one process: gradients, metrics, checkpoints from one layout to another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import spawn
from parallel_runs import layouts, tiny_config, tiny_model, write_corpus
from torch import Tensor
from torch.distributed.tensor import DTensor

from etr.data import IGNORED, Batch, load_tokenizer, open_data
from etr.parallel import ParallelConfig, Ranks, gradient_norms, sum_gradients
from etr.train import train
from etr.train.checkpoint import consolidate, list_checkpoints
from etr.train.loop import Trainer
from etr.train.metrics import read_metrics
from etr.train.model import build_model
from etr.train.spread import spread
from etr.train.step_loss import StepLoss

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless"),
]

ROUTERS = ("etr", "token_choice")
ROWS, LENGTH = 8, 6


def micro_batches() -> list[Batch]:
    """Two of them, with labels that are few on one rank and none on another."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for number in range(2):
        ids = torch.randint(0, 200, (ROWS, LENGTH), generator=generator)
        labels = torch.randint(0, 200, (ROWS, LENGTH), generator=generator)
        labels[: 2 - number] = IGNORED
        labels[-1, number:] = IGNORED
        zero = torch.zeros_like(ids)
        batches.append(Batch(input_ids=ids, labels=labels, domain=zero[:, 0], position=zero))
    return batches


def gradients(
    router: str, parallel: ParallelConfig, ranks: Ranks, checkpointing: bool = False
) -> dict[str, Any]:
    """One step's losses, norm and whole gradients, in float64."""
    model = build_model(tiny_model(router), load_tokenizer("byte"), LENGTH, seed=1)
    torch.nn.Module.double(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    mesh = spread(model, parallel, ranks)
    share = ROWS // ranks.size
    rows = slice(ranks.rank * share, (ranks.rank + 1) * share)
    batches = [
        Batch(**{name: value[rows] for name, value in vars(batch).items()})
        for batch in micro_batches()
    ]
    loss, losses = StepLoss(model, ranks, "fp32").backward(batches)
    if mesh is not None:
        sum_gradients(model, mesh)
    norm = gradient_norms([model.parameters()], ranks)[0]
    return {"loss": loss, "losses": losses, "norm": norm, "gradients": whole_gradients(model)}


def whole_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def work(world: int, folder: str, source: str | None) -> dict[str, Any]:
    """All that the tests ask of so many ranks: their gradients, and a run or two."""
    ranks, found = Ranks.current(), dict[str, Any]()
    for parallel in layouts(world):
        name = (parallel.expert_ranks, parallel.fsdp)
        for router in ROUTERS:
            found["gradients", router, *name] = gradients(router, parallel, ranks)
    found["checkpointing"] = gradients("etr", ParallelConfig(expert_ranks=2), ranks, True)
    config = tiny_config(
        Path(folder), f"of_{world}", parallel=ParallelConfig(expert_ranks=2), steps=5
    )
    data = open_data(config.data)
    train(config, data=data)
    for name, parallel in {
        "same": ParallelConfig(expert_ranks=2),
        "experts": ParallelConfig(expert_ranks=world, fsdp=False),
        "replicas": ParallelConfig(expert_ranks=1),
    }.items():
        other = dataclasses.replace(config, parallel=parallel)
        resume_at(other, data, Path(folder) / (source or ""), f"{world}_{name}", ranks)
    return found


def resume_at(config: Any, data: Any, source: Path, name: str, ranks: Ranks) -> None:
    """The step after the checkpoint at step 4 of another run, as a run of its own."""
    target = source.with_name(f"resumed_{name}")
    if ranks.is_first:
        copy_checkpoint(source, target)
    ranks.gather(None)
    train(dataclasses.replace(config, out=str(target), resume=True), data=data)


def copy_checkpoint(source: Path, target: Path) -> None:
    import shutil

    checkpoint = next(p for p in list_checkpoints(source) if p.name.endswith("4"))
    shutil.copytree(checkpoint, target / "checkpoints" / checkpoint.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a corpus, and the runs of one process."""
    folder = tmp_path_factory.mktemp("parallel")
    write_corpus(folder / "corpus")
    train(tiny_config(folder, "of_1", steps=5))
    return folder


@pytest.fixture(scope="module")
def four(folder: Path) -> dict[Any, Any]:
    """What rank 0 of four found; they resume from the run of one."""
    return spawn(4, work, folder / "ranks4", 4, str(folder), "of_1")[0]


@pytest.fixture(scope="module")
def two(folder: Path, four: Any) -> dict[Any, Any]:
    """What rank 0 of two found; they resume from the run of four."""
    return spawn(2, work, folder / "ranks2", 2, str(folder), "of_4")[0]


@pytest.fixture(scope="module")
def found(two: Any, four: Any) -> dict[int, dict[Any, Any]]:
    return {2: two, 4: four}


def assert_same_gradients(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-12)
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-9)
    assert got["norm"] == pytest.approx(want["norm"], rel=1e-9)
    assert got["gradients"].keys() == want["gradients"].keys()
    for name, value in want["gradients"].items():
        torch.testing.assert_close(
            got["gradients"][name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    ("world", "parallel"),
    [(world, parallel) for world in (2, 4) for parallel in layouts(world)],
    ids=lambda v: v if isinstance(v, int) else f"expert{v.expert_ranks}-fsdp{int(v.fsdp)}",
)
def test_gradients_are_those_of_one_process(
    found: dict[int, Any], world: int, parallel: ParallelConfig, router: str
) -> None:
    want = gradients(router, ParallelConfig(), Ranks(None))
    assert want["losses"]["aux"] > 0
    assert all(value.abs().max() > 0 for value in want["gradients"].values())
    got = found[world]["gradients", router, parallel.expert_ranks, parallel.fsdp]
    assert_same_gradients(got, want)


@pytest.mark.parametrize("world", [2, 4])
def test_recomputed_activations_change_no_gradient(found: dict[int, Any], world: int) -> None:
    assert_same_gradients(
        found[world]["checkpointing"], gradients("etr", ParallelConfig(), Ranks(None))
    )


def rows(folder: Path, name: str, kind: str, step: int) -> list[dict[str, Any]]:
    metrics = read_metrics(folder / name / "metrics.jsonl")
    return [row for row in metrics if row["kind"] == kind and row["step"] == step]


@pytest.mark.parametrize("world", [2, 4])
def test_metrics_are_those_of_one_process(folder: Path, found: Any, world: int) -> None:
    (want,), (got,) = (rows(folder, f"of_{n}", "train", 1) for n in (1, world))
    sent = {"bytes_within_node", "bytes_between_nodes", "bytes_between_nodes_padded"}
    assert got.keys() - sent == want.keys()
    assert got["bytes_within_node"] > 0 == got["bytes_between_nodes"]  # one node
    for name in ("tokens", "expert_flops", "loss", "grad_norm", "drop_rate", "capacity_mean"):
        assert got[name] == pytest.approx(want[name], rel=1e-5), name
    assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
    for mine, theirs in zip(got["layers"], want["layers"], strict=True):
        for name, value in theirs.items():
            near = None if value is None else pytest.approx(value, rel=1e-4)
            assert mine[name] == near, name
    for want, got in zip(*(rows(folder, f"of_{n}", "eval", 4) for n in (1, world)), strict=True):
        assert got["selection"] == want["selection"]
        assert got["val_loss_by_domain"] == pytest.approx(want["val_loss_by_domain"], rel=1e-3)


@pytest.mark.parametrize("layout", ["same", "experts", "replicas"])
@pytest.mark.parametrize(("world", "source"), [(4, 1), (2, 4)])
def test_a_checkpoint_resumes_on_another_number_of_ranks(
    folder: Path, found: Any, world: int, source: int, layout: str
) -> None:
    """4 to 2 here; 1 to 4; the same routing, and the same next loss."""
    assert_same_next_step(folder, f"resumed_{world}_{layout}", f"of_{source}")


def test_one_process_resumes_from_two_ranks(folder: Path, two: Any) -> None:
    copy_checkpoint(folder / "of_2", folder / "resumed_1")
    train(tiny_config(folder, "resumed_1", steps=5, resume=True))
    assert_same_next_step(folder, "resumed_1", "of_2")


def assert_same_next_step(folder: Path, resumed: str, source: str) -> None:
    (got,), (want,) = (rows(folder, name, "train", 5) for name in (resumed, source))
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-6)
    for name in ("num_choices_per_expert", "num_tokens_per_expert"):
        assert [x[name] for x in got["layers"]] == [x[name] for x in want["layers"]]


def test_a_run_of_many_becomes_one_model(folder: Path, four: Any) -> None:
    """Consolidated, it evaluates to what its ranks measured."""
    from etr.evaluate import evaluate
    from etr.hf import load_pretrained
    from etr.train.tasks import LanguageTask

    config = tiny_config(folder, "of_4")
    data = open_data(config.data)
    checkpoint = next(p for p in list_checkpoints(folder / "of_4") if p.name.endswith("4"))
    consolidate(checkpoint, folder / "whole")
    model = load_pretrained(folder / "whole")
    for row in rows(folder, "of_4", "eval", 4):
        result = evaluate(
            model,
            LanguageTask(data).held_out_batches(config),
            data.dataset.domains,
            row["selection"],
        )
        assert result.loss == pytest.approx(row["val_loss"], rel=1e-6)
        assert result.kept_fraction == pytest.approx(row["kept_fraction_eval"])
    with pytest.raises(ValueError, match="exists already"):
        consolidate(checkpoint, folder / "whole")


def test_a_batch_that_ranks_cannot_share_is_refused(folder: Path) -> None:
    config = tiny_config(folder, "odd", parallel=ParallelConfig(expert_ranks=2))
    with pytest.raises(ValueError, match="expert_ranks=2 needs as many processes"):
        Trainer(config, open_data(config.data))
    with pytest.raises(ValueError, match="expert_ranks=0 must be at least 1"):
        ParallelConfig(expert_ranks=0)
