"""Another objective by one row: block-causal attention and drawn weights, trained and evaluated."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from etr.cli import main
from etr.data import DataConfig, open_data
from etr.evaluate import evaluate
from etr.evaluate.scores import score_densities
from etr.hf import load_pretrained
from etr.model import OBJECTIVES, Causal, Example, Objective, Text
from etr.model.objective import IGNORED
from etr.moe import moe_layers
from etr.moe.watch import watch
from etr.train import TrainConfig, train
from etr.train.checkpoint_folder import changed_options, list_checkpoints
from etr.train.config import stored_config

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

BLOCK = 4


@dataclass(frozen=True, kw_only=True)
class Blocks(Objective):
    """A place sees its own block and those before; some tokens are hidden, and must be found."""

    name = "blocks"
    summary = "for this test"

    hide: float = 0.5

    def example(self, text: Text, generator: torch.Generator) -> Example:
        rows, length = text.ids.shape
        valid = torch.ones_like(text.ids, dtype=torch.bool) if text.valid is None else text.valid
        hidden = (torch.rand(rows, length, generator=generator) < self.hide).to(text.ids.device)
        hidden &= valid
        block = torch.arange(length, device=text.ids.device) // BLOCK
        sees = (block[:, None] >= block) & valid[:, None] & valid[:, :, None]
        return Example(
            input_ids=text.ids.masked_fill(hidden, 0),
            labels=text.ids.masked_fill(~hidden, IGNORED),
            counted=valid,
            valid=valid,
            attention=sees | torch.eye(length, dtype=torch.bool, device=text.ids.device),
            weight=hidden / self.hide,
        )


@pytest.fixture
def blocks():
    OBJECTIVES[Blocks.name] = Blocks
    yield Blocks
    del OBJECTIVES[Blocks.name]


SIZES = (
    "--hidden-size 32 --num-layers 2 --num-heads 2 --num-key-value-heads 2 --num-experts 4 "
    "--expert-size 16 --sequence-length 32 --batch-size 4 --eval-every 6 --checkpoint-every 3 "
    "--eval-tokens-per-domain 64 --warmup-steps 2 --device cpu --profile-every None"
)


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        stream = random.Random(number)
        body = " ".join(str(stream.randrange(10**6)) for _ in range(100))
        (folder / f"{number}.txt").write_text(f"{number}: {body}\n")
    return ["--data", str(folder), "--cache-dir", str(tmp_path / "cache")]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def test_it_trains_resumes_and_is_evaluated_end_to_end(blocks, text, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*SIZES.split(), *text, "--objective", "blocks:hide=0.4"]
    assert main(["train", "--out", str(whole), "--steps", "6", *options]) == 0
    found = losses(whole)
    assert len(found) == 6
    assert main(["train", "--out", str(parts), "--steps", "3", *options]) == 0
    assert main(["train", "--out", str(parts), "--resume", "--steps", "6"]) == 0
    # The schedules of 3 and 6 steps differ, so only what was drawn is compared: step 1.
    assert losses(parts)[0] == found[0]
    capsys.readouterr()
    arguments = ["--max-tokens-per-domain", "64", "--json", str(tmp_path / "r.json")]
    assert main(["evaluate", str(whole), *arguments]) == 0  # with the run's own objective
    own = json.loads((tmp_path / "r.json").read_text())
    assert main(["evaluate", str(whole), *arguments, "--objective", "causal"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["models"] != own["models"]
    changed = ["train", "--out", str(whole), "--resume", "--steps", "8", "--objective", "causal"]
    assert main(changed) == 2
    assert "--objective is 'blocks:hide=0.4' there" in " ".join(capsys.readouterr().err.split())


def test_what_is_drawn_is_of_the_step_and_resumes_exactly(blocks, text, tmp_path, monkeypatch):
    """Interrupted after three of six steps and resumed: the same losses bit for bit."""
    options = [*SIZES.split(), *text, "--objective", "blocks", "--steps", "6"]
    assert main(["train", "--out", str(tmp_path / "whole"), *options]) == 0
    from etr.train.loop import Trainer

    original = Trainer.save

    def save(self) -> None:
        original(self)
        self.saver.wait()
        if self.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save", save)
        assert main(["train", "--out", str(tmp_path / "parts"), *options]) == 130
    assert main(["train", "--out", str(tmp_path / "parts"), *options, "--auto-resume"]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def a_run(text: list[str], out: Path, objective: str):
    data = DataConfig(data=(text[1],), cache_dir=text[3], sequence_length=32, batch_size=4)
    config = TrainConfig(out=str(out), data=data, steps=1, objective=objective, device="cpu")
    small = TrainConfig.from_dict(
        {
            **config.to_dict(),
            "model": {
                **config.to_dict()["model"],
                "hidden_size": 32,
                "num_layers": 2,
                "num_heads": 2,
                "num_key_value_heads": 2,
            },
            "eval_tokens_per_domain": 64,
            "diagnostics": False,
            "profile_every": None,
        }
    )
    return train(small), open_data(data)


def test_the_mask_of_pairs_keeps_padding_out_of_routers(blocks, text, tmp_path):
    result, data = a_run(text, tmp_path / "run", "blocks")
    from etr.data import held_out_batches

    batches = list(held_out_batches(data.dataset, 32, 4, 200))
    batches[0].labels[0, 20:] = IGNORED  # padding
    seen = 0

    def see(place, view) -> None:
        nonlocal seen
        seen += int(view.routing.valid_mask.sum()) if place == 0 else 0

    model = result.model
    with watch(model, see):
        found = evaluate(model, batches, data.dataset.domains, "dropless", objective=Blocks())
    valid = sum(int(batch.valid_mask.sum()) for batch in batches)
    assert seen == valid == sum(found.tokens_by_domain.values())
    again = evaluate(model, batches, data.dataset.domains, "dropless", objective=Blocks())
    assert again == found
    other = evaluate(model, batches, data.dataset.domains, "dropless", objective=Blocks(hide=0.9))
    assert other.loss != found.loss
    densities = [score_densities(model, batches, objective=o) for o in (Causal(), Blocks())]
    assert densities[0] != densities[1]


def test_a_comparison_shows_scores_of_the_objectives_examples(blocks, text, tmp_path, monkeypatch):
    result, _ = a_run(text, tmp_path / "run", "blocks:hide=0.4")
    config = stored_config(tmp_path / "run")
    seen = []
    compare = sys.modules["etr.train.compare"]  # the package has a function of this name
    monkeypatch.setattr(compare, "score_densities", lambda *_, objective: seen.append(objective))
    compare._summary("a", config, result)
    assert seen == [Blocks(hide=0.4)]


def test_blocks_do_not_see_what_comes_later(blocks, text, tmp_path):
    result, _ = a_run(text, tmp_path / "run", "blocks")
    model = load_pretrained(list_checkpoints(tmp_path / "run")[-1])
    ids = torch.randint(3, 200, (2, 16), generator=torch.Generator().manual_seed(0))
    plain = Text(ids=ids, following=ids, valid=None)
    changed = ids.clone()
    changed[:, 8:] = (ids[:, 8:] + 1) % 200

    def logits(ids: torch.Tensor) -> torch.Tensor:
        example = Blocks(hide=1e-9).example(
            Text(ids=ids, following=plain.following), torch.Generator().manual_seed(0)
        )
        with torch.no_grad():
            return model(**example.arguments()).logits

    assert all(layer.eval_selection == "threshold" for layer in moe_layers(model))
    old, new = logits(ids), logits(changed)
    torch.testing.assert_close(new[:, :8], old[:, :8], rtol=1e-5, atol=1e-5)
    assert (new[:, 8:] - old[:, 8:]).abs().amax(-1).min() > 1e-3
    within = ids.clone()
    within[:, 7] = (ids[:, 7] + 1) % 200
    # A block sees all of itself.
    assert (logits(within)[:, 4] - old[:, 4]).abs().max() > 1e-4
    assert result.steps == 1


def test_runs_of_before_there_was_a_choice_go_on_as_causal():
    now = TrainConfig().fingerprint()
    before = {name: value for name, value in now.items() if name != "objective"}
    assert changed_options(before, now) == {}
    assert changed_options(before, {**now, "objective": "blocks"}) == {
        "objective": ("causal", "blocks")
    }
