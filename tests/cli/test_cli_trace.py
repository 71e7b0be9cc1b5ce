"""`etr trace`: models of this library and of transformers, the options, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from etr.cli import main
from etr.data import byte_tokenizer
from etr.systems import CACHES, PLANNERS, Demand, Plan, replay, travel
from etr.trace import read_trace

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

BASE = MixtralConfig(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(60):
        stream = random.Random(number)
        body = " ".join(str(stream.randrange(10**6)) for _ in range(100))
        (folder / f"{number}.txt").write_text(f"{number}: {body}\n")
    return folder


@pytest.fixture(scope="module")
def options(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    return [
        *("--data", str(text), "--cache-dir", str(cache), "--device", "cpu"),
        *("--sequence-length", "32", "--batch-size", "4"),
    ]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain transformers model."""
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    MixtralForCausalLM(BASE).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint, as training leaves it."""
    folder = tmp_path_factory.mktemp("run") / "run"
    size = [
        *("--hidden-size", "32", "--num-layers", "2", "--num-heads", "2"),
        *("--num-key-value-heads", "2", "--num-experts", "4", "--expert-size", "16"),
        *("--steps", "3", "--eval-tokens-per-domain", "64", "--warmup-steps", "1"),
        *("--device", "cpu", "--profile-every", "None", "--no-diagnostics"),
    ]
    assert main(["train", "--out", str(folder), *options, *size]) == 0
    return folder


@pytest.mark.parametrize("kind", ["run", "mixtral"])
def test_a_model_is_traced(kind, request, options, capsys):
    folder = request.getfixturevalue(kind)
    assert main(["trace", str(folder), "--max-tokens", "320", *options]) == 0
    out = capsys.readouterr().out
    trace = read_trace(folder / "trace.parquet")
    assert 288 <= trace.num_tokens <= 320
    assert trace.info.num_layers == 2
    assert trace.info.router == ("etr" if kind == "run" else "mixtral")
    assert trace.table["text"].null_count == 0
    for wanted in ("MaxVio", "SRP(16)", "SCH(16, ", f"{trace.num_tokens} tokens", "trace.parquet"):
        assert wanted in out, wanted
    if kind == "run":
        assert trace.info.source.endswith("step-00000003")


def test_options(run, options, tmp_path, capsys):
    out = tmp_path / "new" / "t.parquet"
    chosen = ["--out", str(out), "--selection", "batch", "--segment", "8", "--max-tokens", "None"]
    assert main(["trace", str(run), *chosen, *options]) == 0
    trace = read_trace(out)
    assert trace.info.selection == "batch"
    assert trace.num_tokens > 1000
    assert "SRP(8)" in capsys.readouterr().out


def copy_of(mixtral: Path, tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("trace.parquet")  # of an earlier test
    return Path(shutil.copytree(mixtral, tmp_path / "copy", ignore=ignored))


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "is not a folder"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: change_config(f, model_type="llama"), "model_type='llama'"),
        (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 64), "is damaged"),
        (lambda f: change_config(f, num_hidden_layers=3), "missing (such as"),
        (lambda f: change_config(f, num_local_experts=8), "of another shape (such as"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_what_cannot_be_traced(damage, message, mixtral, options, tmp_path, capsys):
    folder = copy_of(mixtral, tmp_path)
    damage(folder)
    assert main(["trace", str(folder), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*trace.parquet*"))


def test_a_tokenizer_of_another_model(options, tmp_path, capsys):
    small = MixtralConfig(**{**BASE.to_dict(), "vocab_size": 100})
    MixtralForCausalLM(small).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert main(["trace", str(tmp_path), *options]) == 2
    assert "vocab_size=100" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--max-tokens", "--segment"])
def test_options_are_checked(option, mixtral, capsys):
    with pytest.raises(SystemExit):
        main(["trace", str(mixtral), option, "0"])
    assert "must be at least 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def traced(mixtral: Path, options: list[str]) -> Path:
    out = mixtral / "for plans.parquet"
    arguments = ["trace", str(mixtral), "--out", str(out), "--max-tokens", "320", *options]
    assert main(arguments) == 0
    return out


@pytest.mark.parametrize("name", [*PLANNERS, "round_robin:by_load=true"])
def test_experts_are_placed_by_a_trace(name, traced, capsys):
    assert main(["plan", name, str(traced), "--ranks", "2", "--nodes", "2"]) == 0
    out = capsys.readouterr().out
    assert "plan.json" in out
    picture = ET.parse(traced.parent / "plan.svg").getroot()
    assert picture.tag.endswith("svg")
    words = ["".join(element.itertext()) for element in picture.iter()]
    assert {"before, consecutive", f"after, {name}"} <= {*words}
    plan = Plan.from_dict(json.loads((traced.parent / "plan.json").read_text()))
    assert (plan.rank_of_expert.shape, plan.devices.num_nodes) == ((2, 4), 2)
    demand = Demand.of(*map(torch.tensor, read_trace(traced).choices()), num_experts=4)
    for placed in (plan, PLANNERS["consecutive"]().plan(demand, plan.devices)):
        found = travel(demand, placed)
        assert found.pairs == demand.counts.sum()
        assert f"{found.pairs_between_ranks / found.pairs:.1%}" in out
        assert f"{found.hops_between_nodes / found.hops:.1%}" in out
        assert f"{found.max_over_mean:.2f} of mean" in out


def table_rows(out: str, names: object) -> list[list[str]]:
    """Cells of the rows of a printed table whose second cell is one of the names."""
    return [x for line in out.splitlines() if (x := line.split())[1:2] in ([n] for n in names)]


def test_a_trace_is_replayed_in_memories(traced, capsys):
    assert main(["cache", str(traced), "--expert-bytes", "1000"]) == 0
    choices = torch.from_numpy(read_trace(traced).choices(kept=True)[0])
    names = [name for name, kind in CACHES.items() if not kind.predicts]
    rows = table_rows(capsys.readouterr().out, CACHES)
    assert [row[:2] for row in rows] == [[str(n), name] for n in (1, 2, 4) for name in names]
    for size, name, hits, share, moved in rows:
        found, bound = (
            replay(choices, CACHES[n](), int(size), num_experts=4) for n in (name, "oracle")
        )
        assert (hits, moved) == (f"{found.hit_rate:.1%}", f"{found.loads / 1000:,.1f}")
        assert share == (f"{found.hits / bound.hits:.1%}" if bound.hits else "-")


def test_a_policy_learns_from_another_trace_and_time_is_printed(traced, capsys):
    arguments = ["cache", str(traced), "--sizes", "2", "--learn-from", str(traced)]
    way = ["--expert-bytes", "1000", "--bandwidth", "1e6", "--latency", "0.5"]
    assert main([*arguments, *way]) == 0
    rows = {row[1]: row for row in table_rows(capsys.readouterr().out, CACHES)}
    assert list(rows) == list(CACHES)
    hits = {name: float(row[2].rstrip("%")) for name, row in rows.items()}
    assert hits["expertflow"] <= hits["oracle"]
    choices = torch.from_numpy(read_trace(traced).choices(kept=True)[0])
    loads = replay(choices, CACHES["lru"](), 2, num_experts=4).loads
    assert rows["lru"][5] == f"{loads * 0.501:,.3f}"


def test_batches_are_made_by_what_is_predicted(traced, capsys):
    """Beside the order of the trace and what the truth would have made; counted by hand."""
    arguments = ["cache", str(traced), "--sizes", "2", "--learn-from", str(traced)]
    assert main([*arguments, "--regroup", "2"]) == 0
    out = capsys.readouterr().out
    assert "batches of 2 sequences" in out
    rows = {line.split("  ")[0].strip(): line.split() for line in out.splitlines()}
    trace = read_trace(traced)
    choices, sequence = trace.choices(kept=True)
    numbers = sorted({*sequence.tolist()})
    pairs = [numbers[first : first + 2] for first in range(0, len(numbers), 2)]
    used = [
        len({*layer[(sequence >= pair[0]) & (sequence <= pair[-1])].flatten().tolist()} - {-1})
        for layer in choices
        for pair in pairs
    ]
    assert rows["in order"][-2:] == [f"{sum(used) / len(used):.2f}", "100.0%"]
    for name in ("by what is used", "by expertflow"):
        assert 0 < float(rows[name][-2]) <= 4
    assert "by edgemoe" not in rows  # it goes by choices, which batches come before


def test_memories_forget_what_experts_dropped(run, options, tmp_path):
    """A choice that was dropped runs no expert."""
    out = tmp_path / "t.parquet"
    assert main(["trace", str(run), "--selection", "batch", "--out", str(out), *options]) == 0
    trace = read_trace(out)
    kept, every = (trace.choices(kept=kept)[0] for kept in (True, False))
    assert (kept >= 0).sum() == sum(trace.layer(i).kept.sum() for i in range(2))
    assert ((kept == every) | (kept < 0)).all()


def test_measures_are_chosen(run, options, tmp_path, capsys):
    words = ["--max-tokens", "64", "--measures", "sch:segment=4,size=1", "--out"]
    assert main(["trace", str(run), *words, str(tmp_path / "t.parquet"), *options]) == 0
    out = capsys.readouterr().out
    assert "SCH(4, 1)" in out
    assert "SRP" not in out


def test_a_plan_makes_the_renumbered_model(run, options, tmp_path, capsys, monkeypatch):
    """Of the trace's own model alone; measured on a held-out trace of it, too."""
    monkeypatch.setenv("COLUMNS", "160")
    trace, new, plan = tmp_path / "t.parquet", tmp_path / "new", tmp_path / "p.json"
    assert main(["trace", str(run), "--max-tokens", "320", "--out", str(trace), *options]) == 0
    arguments = ["plan", "exflow", str(trace), "--ranks", "2", "--out", str(plan)]
    more = ["--held-out", str(trace), "--model", str(run), "--placed", str(new)]
    capsys.readouterr()
    assert main([*arguments, *more]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for said in ("plan, held out", "hops between ranks, plan", "computes what the source does"):
        assert said in out
    record = json.loads(plan.read_text())
    demand = Demand.of(*map(torch.tensor, read_trace(trace).choices()), num_experts=4)
    after = travel(demand, Plan.from_dict(record)).flow.tolist()
    assert record["hops_between_ranks"]["after"] == after
    assert json.loads((new / "transform.json").read_text())["plan"]["planner"] == "exflow"


def test_traces_of_other_models_are_refused(run, traced, options, tmp_path, capsys):
    trace = tmp_path / "t.parquet"
    assert main(["trace", str(run), "--max-tokens", "64", "--out", str(trace), *options]) == 0
    for verb, option in (("plan exflow", "held_out"), ("cache", "learn_from")):
        arguments = [*verb.split(), str(trace), f"--{option}", str(traced)]
        assert main([*arguments, *(["--ranks", "2"] if verb != "cache" else [])]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{option}='{traced}' is a trace of another model: its source is" in said
    assert not list(tmp_path.glob("plan.*"))
    arguments = ["plan", "exflow", str(traced), "--ranks", "2", "--model", str(run)]
    assert main([*arguments, "--placed", str(tmp_path / "new")]) == 2
    assert "the trace is of the model in" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_model_writes_the_same_with_its_experts_on_disk(run, capsys):
    words = ["generate", str(run), "--prompt", "1 2", "--max-new-tokens", "8"]
    assert main(words) == 0
    want = capsys.readouterr().out
    assert main([*words, "--offload", "disk", "--resident", "1", "--cache", "lfu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(want)
    assert "experts in memory: 1 of 4 in each layer" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nonsense", "{trace}", "--ranks", "2"], "planner='nonsense' is unknown; choose"),
        (["plan", "consecutive", "{trace}", "--ranks", "3"], "num_experts=4 is not a multiple"),
        (
            ["plan", "consecutive", "no.parquet", "--ranks", "2"],
            "trace 'no.parquet' does not exist",
        ),
        (["plan", "consecutive", "{trace}", "--ranks", "4", "--nodes", "3"], "num_nodes=3"),
        (["plan", "consecutive", "{trace}", "--ranks", "2", "--out", "p.svg"], "out='p.svg' must"),
        (["cache", "{trace}", "--caches", "nonsense"], "cache='nonsense' is unknown; choose"),
        (["cache", "{trace}", "--sizes", "0"], "must be at least 1, not 0"),
        (["cache", "{trace}", "--regroup", "2"], "regroup=2 must be at least 1, sequences of"),
    ],
)
def test_what_plan_and_cache_refuse(arguments, message, traced, capsys):
    try:
        code = main([word.format(trace=traced) for word in arguments])
    except SystemExit as end:  # an option that is wrong by itself
        code = end.code
    assert code == 2
    output = capsys.readouterr()
    assert message in " ".join((output.out + output.err).replace("│", " ").split())


def test_a_trace_that_is_cut_short_leaves_no_plan_and_no_picture(traced, tmp_path, capsys):
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(traced.read_bytes()[:-100])
    assert main(["plan", "exflow", str(cut), "--ranks", "2"]) == 2
    assert "is cut short" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == [cut]


def test_a_placement_is_carried_out(mixtral, traced, tmp_path, capsys):
    plan, new = tmp_path / "p.json", tmp_path / "new"
    arguments = ["plan", "round_robin", str(traced), "--ranks", "2", "--out", str(plan)]
    assert main(arguments) == 0
    assert f"etr transform renumber SOURCE NEW_FOLDER --plan {plan}" in capsys.readouterr().out
    assert main(["transform", "renumber", str(mixtral), str(new)]) == 2
    assert "give the file of etr plan" in capsys.readouterr().err
    assert not new.exists()
    assert main(["transform", "renumber", str(mixtral), str(new), "--plan", str(plan)]) == 0
    out = capsys.readouterr().out
    assert "computes what the source does" in out
    assert "logits differ by at most" in out
    order = [0, 2, 1, 3]
    key = "model.layers.{}.block_sparse_moe.gate.weight"
    old, moved = (load_file(folder / "model.safetensors") for folder in (mixtral, new))
    for layer in range(2):
        assert torch.equal(moved[key.format(layer)], old[key.format(layer)][order])
    # The record of a transform is a plan too, and the same order once more is the way back.
    back = ["transform", "renumber", str(new), str(tmp_path / "back"), "--no-compare"]
    assert main([*back, "--plan", str(new / "transform.json")]) == 0
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in old.items())
