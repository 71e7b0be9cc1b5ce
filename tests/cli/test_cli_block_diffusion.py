"""Every verb on a model that was trained by block diffusion, as its run says."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from etr.cli import main
from etr.cli._progress import describe
from etr.report.routed import read_routed
from etr.systems import CACHES, replay
from etr.trace import read_trace

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

SIZE = (
    "--hidden-size 16 --num-layers 1 --num-heads 2 --num-key-value-heads 2 --num-experts 4 "
    "--expert-size 16 --sequence-length 16 --batch-size 4 --steps 4 --eval-every 4 "
    "--checkpoint-every 4 --eval-tokens-per-domain 64 --warmup-steps 2 --device cpu "
    "--profile-every None --router etr --objective block_diffusion:block=4"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    (folder / "text").mkdir()
    for number in range(40):
        stream = random.Random(number)
        words = " ".join(stream.choice("abcdefgh") * 3 for _ in range(60))
        (folder / "text" / f"{number}.txt").write_text(f"{number}: {words}\n")
    text = ["--data", str(folder / "text"), "--cache-dir", str(folder / "cache")]
    assert main(["train", "--out", str(folder / "run"), *text, *SIZE.split()]) == 0
    return folder / "run"


def test_it_trained(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["kind"] == "eval"]
    assert [row["selection"] for row in found] == ["dropless"]  # thresholds do not serve it
    assert len([row for row in rows if row["kind"] == "train"]) == 4


def test_every_loss_that_is_shown_is_called_an_upper_bound(
    run: Path, tmp_path: Path, capsys
) -> None:
    """In lines of progress, in the table and the page of a report, and while it is watched."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] in ("train", "eval"):
            assert "(upper bound)" in describe(row)
    assert main(["watch", str(run), "--once"]) == 0
    assert capsys.readouterr().out.count("(upper bound)") == 2
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--out", str(page)]) == 0
    assert "The loss of run is an upper bound of the text" in page.read_text()
    assert "\N{LESS-THAN OR EQUAL TO}\N{NO-BREAK SPACE}" in page.read_text()


def test_evaluate_says_that_it_is_an_upper_bound(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "scores.json"
    limits = ["--max-tokens-per-domain", "64", "--json", str(out)]
    assert main(["evaluate", str(run), *limits]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "dropless selection: thresholds were calibrated on noised and clean" in printed
    (model,) = json.loads(out.read_text())["models"]
    assert list(model["tasks"][0]["rows"]) == ["nats/token (upper bound)"]
    scores = model["tasks"][0]["scores"]["all"]
    assert set(scores) == {
        "bits/byte (upper bound)",
        "nats/token (upper bound)",
        "nats/token to find",
        "kept share",
    }
    # An untrained model knows nothing: the bound's mean is near log 264 too.
    assert 3 < scores["nats/token to find"]["value"] < 7
    assert main(["evaluate", str(run), str(run), *limits]) == 0
    assert "paired over" in capsys.readouterr().out
    assert main(["evaluate", str(run), *limits, "--objective", "causal"]) == 0
    (model,) = json.loads(out.read_text())["models"]
    assert "nats/token" in model["tasks"][0]["scores"]["all"]


def test_generate_fills_blocks(run: Path, capsys) -> None:
    command = ["generate", str(run), "--prompt", "7: aaa", "--max-new-tokens", "9"]
    greedy = [*command, "--temperature", "0"]
    found = []
    for options in ([], ["--unmasking", "quota:steps=4"], ["--objective", "causal"]):
        assert main([*greedy, *options]) == 0
        found.append(capsys.readouterr().out)
        assert found[-1].startswith("7: aaa")
        assert "<unused" not in found[-1]
    assert found[2] not in found[:2]
    assert main([*command, "--decoding", "scmoe"]) == 2
    assert "chooses next tokens" in " ".join(capsys.readouterr().err.split())


def test_offloading_changes_no_token(run: Path, capsys) -> None:
    greedy = ["generate", str(run), "--prompt", "7: aaa", "--max-new-tokens", "9"]
    assert main(greedy) == 0
    whole = capsys.readouterr().out
    assert main([*greedy, "--offload", "disk", "--resident", "1"]) == 0
    assert capsys.readouterr().out.startswith(whole)


def test_a_trace_has_both_halves_of_each_row(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace.parquet"
    assert main(["trace", str(run), "--max-tokens", "64", "--out", str(out)]) == 0
    trace = read_trace(out)
    layer = trace.layer(0)
    assert trace.num_tokens == 128
    assert trace.info.selection == "dropless"
    noised, clean = (layer.token_id.reshape(4, 2, 16)[:, half] for half in (0, 1))
    hidden = noised == 259
    assert hidden.any()
    assert not (clean == 259).any()
    assert (noised == clean)[~hidden].all()
    assert layer.sequence.tolist() == [n for n in range(8) for _ in range(16)]
    assert layer.position.tolist() == list(range(16)) * 8
    assert trace.info.columns == ("block",)
    assert layer.block.tolist() == [place // 4 for place in range(16)] * 8


def test_steps_are_recorded_while_it_writes_and_replayed(run: Path, tmp_path: Path, capsys) -> None:
    """The text is the one without; block by position, steps of a block counted up."""
    out = tmp_path / "steps.parquet"
    greedy = ["generate", str(run), "--prompt", "7: aaa", "--max-new-tokens", "9"]
    assert main(greedy) == 0
    text = capsys.readouterr().out
    assert main([*greedy, "--trace", str(out), "--offload", "disk", "--resident", "2"]) == 0
    found = capsys.readouterr().out
    assert found.startswith(text)
    trace = read_trace(out)
    layer = trace.layer(0)
    assert trace.info.columns == ("block", "step")
    assert (layer.block == layer.position // 4).all()
    assert set(layer.step[layer.block == 0]) == {-1}  # the prompt's one whole block
    assert set(layer.step[layer.block == 1]) >= {-1, 0}
    assert trace.rows(0)["text"].to_pylist()[:6] == [*"7: a", *"aa"]
    step, choices = torch.tensor(trace.step), torch.from_numpy(trace.choices(kept=True)[0])
    for name in ("lru", "tide:every=2"):
        assert main(["cache", str(out), "--sizes", "2", "--caches", name]) == 0
        done = replay(choices, CACHES.parse(name), 2, num_experts=4, step=step)
        out_text = capsys.readouterr().out
        assert f"{done.hit_rate:.1%}" in out_text
        assert f"in {len(step.unique_consecutive())} passes" in out_text
        if name == "lru":
            assert f"{done.hit_rate:.1%} of {done.uses:,} uses" in found
    shown = read_routed(out)
    kept = layer.step < 0
    assert "".join(piece.text for piece in shown.texts[0].pieces) == "".join(
        word for word, there in zip(trace.rows(0)["text"].to_pylist(), kept, strict=True) if there
    )


def test_what_steps_do_not_go_with_is_refused(run: Path, tmp_path: Path, capsys) -> None:
    steps, text, out = (str(tmp_path / name) for name in ("steps", "text", "no"))
    short = ["generate", str(run), "--max-new-tokens", "5", "--trace"]
    assert main([*short, steps]) == 0
    assert main(["trace", str(run), "--max-tokens", "64", "--out", text]) == 0
    for first, second in ((steps, text), (text, steps)):
        assert main(["cache", first, "--learn-from", second]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"'{steps}' has the steps of a model that fills blocks" in said
    assert main([*short, out, "--objective", "causal"]) == 2
    assert "etr trace records" in " ".join(capsys.readouterr().err.split())
    assert not Path(out).exists()
