"""`etr compose`, and `etr generate` of what it makes: a model of letters, and one of digits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from etr.cli import main
from etr.data import byte_tokenizer, train_bpe
from etr.hf import EtrForCausalLM
from etr.hf.loading import load_pretrained
from etr.train.config import ModelConfig, RoutingOptions, TrainConfig
from etr.train.model import build_model

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
DATA = "--data letters digits --cache-dir cache --sequence-length 32"
COMPOSE = f"compose composition models/digits models/letters {DATA} --prompt-length 16"


def small() -> EtrForCausalLM:
    routing = RoutingOptions(router="token_choice", capacity="none", num_experts=2)
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_key_value_heads": 2}
    config = ModelConfig(**sizes, routing=routing)
    return build_model(config, byte_tokenizer(), max_length=64, seed=0)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text of two domains, and a model that knows each."""
    folder = tmp_path_factory.mktemp("compose")
    for name, letters in (("letters", "abcdefgh"), ("digits", "12345678")):
        (folder / name).mkdir()
        for number in range(40):
            stream = random.Random(number)
            text = " ".join(stream.choice(letters) * 3 for _ in range(150))
            (folder / name / f"{number}.txt").write_text(f"{number}: {text}\n")
        model = small()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        ids = torch.tensor([list(f" {text}".encode())[:300]]).view(-1, 30)
        for _ in range(15):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        model.save_pretrained(folder / "models" / name)
        byte_tokenizer().save_pretrained(folder / "models" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*COMPOSE.split(), "--out", "both"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _in_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)


def test_the_composed_model_is_the_better_one_of_each_domain(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Losses are those of `etr evaluate`'s text, here on what follows 16 tokens."""
    record = json.loads(Path("both/composition.json").read_text())
    losses = record["held_out"]
    digits, letters = losses["models/digits"], losses["models/letters"]
    assert digits["digits"] < digits["letters"]
    assert losses["composed"] == losses["best of each domain"]
    assert losses["composed"]["letters"] == letters["letters"]
    assert losses["composed"]["digits"] == digits["digits"]
    assert record["made_of"] == ["models/digits", "models/letters"]
    for number, name in enumerate(("digits", "letters")):
        kept = load_pretrained(f"both/member-{number}").state_dict()
        own = load_pretrained(f"models/{name}").state_dict()
        assert all(torch.equal(kept[key], value) for key, value in own.items())


@pytest.mark.parametrize(
    ("prompt", "number", "name"), [("111 22", 0, "digits"), ("aaa", 1, "letters")]
)
def test_generate_takes_it(
    prompt: str, number: int, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ["--prompt", prompt, "--max-new-tokens", "6", "--selection", "dropless"]
    assert main(["generate", "both", *rest]) == 0
    found = capsys.readouterr()
    assert found.err.splitlines()[-1] == f"both: both/member-{number} answers"
    assert main(["generate", f"models/{name}", *rest]) == 0
    assert capsys.readouterr().out == found.out


def test_a_budget_keeps_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    size = sum(weight.nbytes for weight in small().parameters()) / 1e6
    command = COMPOSE.replace("compose composition", f"compose composition:budget={1.5 * size}")
    assert main([*command.split(), "--out", "one"]) == 0
    said = f"1 of 2 models are kept, {size:,.1f} of {2 * size:,.1f} MB"
    assert said in " ".join(capsys.readouterr().out.split())
    assert json.loads(Path("one/composition.json").read_text())["members"] == 1
    assert not Path("one/member-1").exists()


FUSE = (
    f"compose fusion_route:sft_steps=3,sum_steps=2,preference_steps=2 models/digits models/letters "
    f"{DATA} --prompt-length 16 --prompts-per-domain 4 --batch-size 4 --hidden-size 16 "
    "--num-layers 2 --num-heads 2 --num-key-value-heads 2 --num-experts 2 --expert-size 8 "
    "--router token_choice --device cpu"
)


def test_models_that_write_together_are_trained_saved_and_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Members stay as they are, and so does what is loaded: it writes the same twice."""
    assert main([*FUSE.split(), "--out", "fused"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "all 2 and the router run at every token" in said
    record = json.loads(Path("fused/composition.json").read_text())
    losses = record["held_out"]
    for name in ("models/digits", "models/letters", "chosen alone", "composed"):
        assert losses["best of each token"]["all"] <= losses[name]["all"] or name == "composed"
        assert set(losses[name]) == {"digits", "letters", "all"}
    assert 0 <= record["routed_to_best_of_domain"] <= 1
    kept = load_pretrained("fused/member-1").state_dict()
    own = load_pretrained("models/letters").state_dict()
    assert all(torch.equal(kept[key], value) for key, value in own.items())
    found = []
    for _ in range(2):
        assert main(["generate", "fused", "--prompt", "aaa", "--max-new-tokens", "6"]) == 0
        shown = capsys.readouterr()
        assert shown.err.splitlines()[-1] == "fused"
        found.append(shown.out)
    assert found[0] == found[1]


def test_a_trained_model_becomes_the_router() -> None:
    """With no step at all it is saved as it was, and its scores are all 0."""
    command = FUSE.replace(
        "sft_steps=3,sum_steps=2,preference_steps=2", "sft_steps=0,sum_steps=0,preference_steps=0"
    )
    assert main([*command.split(), "--out", "started", "--start", "models/digits"]) == 0
    router = load_pretrained("started/router").state_dict()
    own = load_pretrained("models/digits").state_dict()
    assert all(torch.equal(router[key], value) for key, value in own.items())
    assert not load_file("started/learned.safetensors")["choice"].any()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{COMPOSE} --out both", "out='both' exists already"),
        ("evaluate both", "both holds several models that answer as one, which etr generate alone"),
        ("generate both --offload disk", "offload='disk' is for one model"),
        (f"compose nothing models/digits {DATA} --prompt-length 9", "composition='nothing' is"),
        (f"{COMPOSE} --out new --prompt-length 32", "prompt_length=32 leaves nothing of a row"),
        (f"{COMPOSE} --out new --prompts-per-domain 0", "prompts_per_domain=0 must be at least 1"),
        (
            f"compose composition models/digits bpe {DATA} --prompt-length 9",
            "models/digits and bpe",
        ),
        (
            f"compose composition:budget=0 models/digits {DATA} --prompt-length 9",
            "is less than the",
        ),
        (f"compose composition models/digits {DATA} short.txt --prompt-length 9", "domain 'short'"),
    ],
)
def test_what_cannot_be_done_is_said(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "bpe" in command and not Path("bpe").exists():
        small().save_pretrained("bpe")
        train_bpe(["a b c"], 259).save_pretrained("bpe")
    if "short" in command:
        command = command.replace(f"{DATA} short.txt", DATA.replace("digits", "digits short.txt"))
        Path("short.txt").write_text("a few words, fewer than two rows are made of\n")
    try:
        status = main(command.split())
    except SystemExit as refused:  # options by themselves
        status = refused.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("new").exists()


def test_models_that_fill_blocks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("blocks/checkpoints/step-00000001").mkdir(parents=True)
    trained = TrainConfig(objective="block_diffusion").to_dict()
    Path("blocks/config.json").write_text(json.dumps(trained))
    for command in (COMPOSE.replace("models/letters", "blocks"), f"{FUSE} --start blocks"):
        assert main([*command.split(), "--out", "new"]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "blocks was trained on block_diffusion: models that are composed write the" in said
    assert main(["generate", "both", "--objective", "block_diffusion"]) == 2
    assert "objective='block_diffusion' is for one model" in capsys.readouterr().err
