"""`transform`: renumbering whole folders, measuring, plans, interruptions, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import calibrated, family_model, make_model, tokens
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from etr.hf import FAMILIES, load_pretrained
from etr.hf.convert import convert, logits_difference, write_model
from etr.hf.shard_writer import MARKER
from etr.hf.shards import WEIGHTS, ShardReader
from etr.hf.transform import RECORD, measure, transform
from etr.hf.transform import plan_of as plan_of_method
from etr.model import TRANSFORMS, LayerTensors, Transform
from etr.model.transform import Renumber, Stats
from etr.moe import MoEConfig, moe_layers
from etr.moe.watch import LayerView
from etr.systems import Devices, Plan

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

WHOLE_GROUPS = [[1, 0, 3, 2], [2, 3, 1, 0]]
"""Old number of each new expert; DeepSeek's groups of two stay together."""
BACK = [[1, 0, 3, 2], [3, 2, 0, 1]]


def plan_of(orders: list[list[int]]) -> dict[str, Any]:
    ranks = torch.tensor(orders).argsort(dim=1)
    return Plan(rank_of_expert=ranks, devices=Devices(num_ranks=4)).to_dict()


def save_family(folder: Path, family: str = "mixtral") -> Path:
    torch.manual_seed(0)
    family_model(family).save_pretrained(folder)
    return folder


def save_ours(folder: Path, source: Path, router: str = "etr") -> Path:
    model = calibrated(make_model(router).float())
    return write_model(model, folder, source)


def same_tensors(first: Path, second: Path) -> None:
    a, b = ShardReader(first), ShardReader(second)
    assert sorted(a.keys()) == sorted(b.keys())
    for key in a.keys():  # noqa: SIM118
        assert a.dtype(key) == b.dtype(key)
        assert torch.equal(a.tensor(key), b.tensor(key)), key


MEMORY = """
import json, resource, sys
from etr.hf.matching import skeleton
from etr.hf.source import Source
from etr.hf.transform import transform
from etr.model import TRANSFORMS
folder, shard, *given = sys.argv[1:]
for number in range(0, len(given), 3):
    skeleton(Source.open(given[number]).config)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, grew = peak(), []
for number in range(0, len(given), 3):
    source, name, plan = given[number : number + 3]
    method, target = TRANSFORMS.parse(name), f"{folder}/{number}"
    with open(plan) as file:
        what = json.load(file)
    transform(source, target, method, plan=what, max_shard_bytes=int(shard))
    grew.append(peak() - before)
print(json.dumps(grew))
"""


def test_memory_is_bounded_by_a_shard_and_a_layer(tmp_path: Path) -> None:
    """In a process of its own, with models of 12 layers: what one layer had and what is made of it,
    a shard, and some room; less than half of the model."""
    sizes = {"vocab_size": 32, "hidden_size": 256, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    dense = LlamaConfig(intermediate_size=4096, **sizes, **heads)
    sparse = MixtralConfig(intermediate_size=512, num_local_experts=8, **sizes, **heads)
    for name, config in (("dense", dense), ("sparse", sparse)):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    half = list(range(1024, 2048)), list(range(2048, 3072))
    apart: Any = {"core": [list(range(1024))] * 12, "experts": [half] * 12}
    apart["router"] = [[0.0] * 256] * 2
    layer = 4 * 3 * 256 * 4096
    shard = layer // 2
    command = [sys.executable, "-c", MEMORY, str(tmp_path), str(shard)]
    bits = {"bits": [[4] * 24] * 12}
    for source, name, plan in (("dense", "read_me", apart), ("sparse", "quantmoe", bits)):
        (tmp_path / f"{name}.json").write_text(json.dumps(plan))
        command += [str(tmp_path / source), name, str(tmp_path / f"{name}.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grew = json.loads(done.stdout.splitlines()[-1])
    assert max(grew) < shard + 2 * layer + 16 * 2**20 < 12 * layer / 2, grew


@pytest.mark.parametrize(
    ("name", "plan", "share"),
    [
        ("compressed_experts:main=1", None, 1 / 2),
        ("flexmore:rank=1", None, 1.0),
        ("easy_ep", {"keep": [[0, 3]] * 2}, 1.0),
        ("heapr", {"keep": [[[0, 1, 2], [0], [], [1, 2]]] * 2}, 5 / 96),
    ],
)
def test_a_report_says_how_much_experts_compute(
    name: str, plan: Any, share: float, tmp_path: Path
) -> None:
    """Of 4 experts, 48 wide, a token takes 2, in two layers."""
    source = save_family(tmp_path / "a")
    report = transform(source, tmp_path / "b", TRANSFORMS.parse(name), plan=plan)
    whole = 2 * 2 * 2 * 3 * json.loads((source / "config.json").read_text())["hidden_size"] * 48
    assert report.source_flops == whole
    assert report.flops == pytest.approx(share * whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_renumbered_in_its_own_format_and_back(family: str, tmp_path: Path) -> None:
    source = save_family(tmp_path / "a", family)
    report = transform(source, tmp_path / "b", Renumber(), plan=plan_of(WHOLE_GROUPS), compare=True)
    assert (report.family, report.to, report.same_function) == (family, "hf", True)
    assert report.difference is not None
    assert report.difference.largest < 1e-5 * report.difference.logit
    first, second = ShardReader(source), ShardReader(tmp_path / "b")
    changed = [k for k in second.keys() if not torch.equal(first.tensor(k), second.tensor(k))]  # noqa: SIM118
    assert len(changed) >= 6  # router and both projections of both layers
    transform(tmp_path / "b", tmp_path / "c", Renumber(), plan=plan_of(BACK))
    same_tensors(source, tmp_path / "c")
    before, after = (json.loads((tmp_path / x / "config.json").read_text()) for x in "ac")
    assert {k: after.get(k) for k in before} == before


@pytest.mark.parametrize("router", ["etr", "token_choice", "expert_choice"])
def test_our_folder_keeps_logits_and_thresholds(router: str, tmp_path: Path) -> None:
    source = save_ours(tmp_path / "a", save_family(tmp_path / "f"), router)
    transform(source, tmp_path / "b", Renumber(), plan=plan_of(WHOLE_GROUPS), compare=True)
    models = [load_pretrained(tmp_path / x) for x in "ab"]
    ids = tokens(batch=4, length=24)
    with torch.no_grad():
        old, new = (model(input_ids=ids).logits for model in models)
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-5)
    for layers, order in zip(zip(*map(moe_layers, models), strict=True), WHOLE_GROUPS, strict=True):
        threshold, moved = (layer.calibration.threshold for layer in layers)
        assert torch.equal(moved, threshold[order])
        assert threshold.unique().numel() > 1
    transform(tmp_path / "b", tmp_path / "c", Renumber(), plan=plan_of(BACK))
    same_tensors(source, tmp_path / "c")


def test_the_record_holds_the_plan_and_guards_the_weights(tmp_path: Path) -> None:
    source = save_family(tmp_path / "a")
    transform(source, tmp_path / "b", Renumber(), plan=plan_of(WHOLE_GROUPS))
    record = json.loads((tmp_path / "b" / RECORD).read_text())
    assert record["transform"] == {"name": "renumber"}
    assert record["plan"] == plan_of(WHOLE_GROUPS)
    convert(tmp_path / "b", tmp_path / "ours")
    assert not (tmp_path / "ours" / RECORD).exists()  # it is not of those weights
    weights = load_file(tmp_path / "b" / WEIGHTS)
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, tmp_path / "b" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors is not what transform.json beside it"):
        transform(tmp_path / "b", tmp_path / "c", Renumber(), plan=plan_of(BACK))
    assert not (tmp_path / "c").exists()


def test_an_interrupted_transform_is_marked_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_family(tmp_path / "a")
    options = {"plan": plan_of(WHOLE_GROUPS), "max_shard_bytes": 20_000}
    transform(source, tmp_path / "whole", Renumber(), **options)
    read: list[str] = []
    original = ShardReader.tensor

    def tensor(self: ShardReader, key: str) -> torch.Tensor:
        read.append(key)
        if len(read) == stop:
            raise KeyboardInterrupt
        return original(self, key)

    monkeypatch.setattr(ShardReader, "tensor", tensor)
    stop = 40
    with pytest.raises(KeyboardInterrupt):
        transform(source, tmp_path / "b", Renumber(), **options)
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "b.partial" / MARKER).is_file()
    assert list((tmp_path / "b.partial").glob("model-*.safetensors"))
    stop, before = -1, set(read[:-1])
    read.clear()
    transform(source, tmp_path / "b", Renumber(), **options)
    assert not before <= set(read)  # what was complete was not made again
    same_tensors(tmp_path / "b", tmp_path / "whole")
    assert not (tmp_path / "b.partial").exists()


@dataclass(frozen=True, kw_only=True)
class Measured(Transform):
    """For these tests: scales each expert's output by what it measures, or widens nothing."""

    name = "measured"
    summary = "for tests"
    needs = ("rows",)

    scale: float = 1.0
    top_k: int = 2

    def changes_function(self) -> str | None:
        return None if self.scale == 1 else f"experts are scaled by {self.scale}"

    def observe(self, view: LayerView) -> Stats:
        weighed = view.rows * view.selection.combine_weight[:, None]
        total = torch.zeros_like(view.output).index_add(0, view.routing.token, weighed)
        torch.testing.assert_close(total, view.output)  # nothing shared in this model
        return {
            "tokens": torch.tensor(len(view.x)),
            "chosen": torch.bincount(view.routing.expert, minlength=4),
        }

    def plan(self, stats: list[Stats], layers: list[MoEConfig]) -> Any:
        return [{name: value.tolist() for name, value in layer.items()} for layer in stats]

    def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
        down = tensors["experts.down_proj"].then(lambda value: value * self.scale)
        return {**tensors, "experts.down_proj": down}

    def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
        return replace(layer, top_k=self.top_k)


BATCHES = [{"input_ids": tokens(seed=seed)} for seed in range(3)]


@pytest.mark.parametrize("kind", ["family", "ours"])
def test_a_method_measures_on_text_and_its_plan_is_json(kind: str, tmp_path: Path) -> None:
    source = save_family(tmp_path / "a")
    if kind == "ours":
        source = save_ours(tmp_path / "o", source)
    report = transform(source, tmp_path / "b", Measured(), batches=BATCHES, compare=True)
    assert report.same_function
    plan = json.loads((tmp_path / "b" / RECORD).read_text())["plan"]
    assert len(plan) == 2
    for layer in plan:
        assert layer["tokens"] == 72
        assert sum(layer["chosen"]) == 144
    same_tensors(source, tmp_path / "b")  # the identity setting, bit for bit
    changed = transform(source, tmp_path / "c", Measured(scale=0.5), plan=plan, compare=True)
    assert (changed.same_function, changed.reason) == (False, "experts are scaled by 0.5")
    assert logits_difference(source, tmp_path / "c").largest > 0.01


def test_a_plan_is_for_one_checkpoint(tmp_path: Path) -> None:
    """Another model's weights are refused, a copy of the folder is not."""
    source = save_family(tmp_path / "a")
    record = plan_of_method(source, Measured(), batches=BATCHES)
    made_for = record["made_for"]
    again = plan_of_method(source, Measured(), batches=BATCHES)
    assert json.loads(json.dumps(record)) == json.loads(json.dumps(again))
    transform(source, tmp_path / "b", Measured(), plan=record["plan"], made_for=made_for)
    written = json.loads((tmp_path / "b" / RECORD).read_text())
    assert {name: written[name] for name in record} == record
    shutil.copytree(source, tmp_path / "copy")
    transform(tmp_path / "copy", tmp_path / "c", Measured(), plan=[], made_for=made_for)
    weights = load_file(source / WEIGHTS)
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the plan was made for another checkpoint"):
        transform(source, tmp_path / "d", Measured(), plan=[], made_for=made_for)
    assert not (tmp_path / "d").exists()


def test_the_source_is_never_written_to(tmp_path: Path) -> None:
    source = save_family(tmp_path / "a")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    transform(source, tmp_path / "b", Measured(scale=0.5), batches=BATCHES, compare=True)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_what_is_measured_is_what_the_model_does() -> None:
    model = make_model("token_choice").float().eval()
    stats = measure(model, Measured(), BATCHES)
    counts = [torch.zeros(4, dtype=torch.int64) for _ in stats]
    from etr.moe.watch import watch

    def see(place: int, view: LayerView) -> None:
        counts[place] += view.selection.num_tokens_per_expert

    with watch(model, see), torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    assert [s["chosen"].tolist() for s in stats] == [c.tolist() for c in counts]
    assert all(not layer.watchers and not layer.output_watchers for layer in moe_layers(model))


def test_options_of_layers_reach_the_config(tmp_path: Path) -> None:
    source = save_family(tmp_path / "a")
    transform(source, tmp_path / "b", Measured(top_k=3), plan=[], compare=False)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_experts_per_tok"] == 3

    class Uneven(Measured):
        def options(self, layer: MoEConfig, plan: Any, place: int) -> MoEConfig:
            return replace(layer, top_k=2 + place)

    report = transform(source, tmp_path / "h", Uneven(), plan=[])
    assert report.to == "etr"  # what the family cannot hold
    assert "MoE layers differ in top_k" in report.why_ours
    layers = moe_layers(load_pretrained(tmp_path / "h"))
    assert [layer.config.top_k for layer in layers] == [2, 3]
    transform(save_ours(tmp_path / "d", source), tmp_path / "e", Uneven(), plan=[])
    layers = moe_layers(load_pretrained(tmp_path / "e"))
    assert [layer.config.top_k for layer in layers] == [2, 3]

    class Wrong(Measured):
        def apply(self, tensors: LayerTensors, plan: Any, place: int) -> LayerTensors:
            down = tensors["experts.down_proj"]
            return {**tensors, "experts.down_proj": down.then(lambda v: v[:3], shape=(3, 32, 48))}

    with pytest.raises(ValueError, match=r"experts.down_proj is \(3, 32, 48\), not \(4, 32, 48\)"):
        transform(source, tmp_path / "c", Wrong(), plan=[])
    assert not (tmp_path / "c").exists()


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    source = save_family(tmp_path / "a")
    plan = plan_of(WHOLE_GROUPS)
    with pytest.raises(ValueError, match="measures on text, and there is none"):
        transform(source, tmp_path / "b", Measured())
    with pytest.raises(ValueError, match="the plan is for 1 layers of 4 experts"):
        transform(source, tmp_path / "b", Renumber(), plan=plan_of(WHOLE_GROUPS[:1]))
    with pytest.raises(ValueError, match="give the file of etr plan"):
        transform(source, tmp_path / "b", Renumber())
    with pytest.raises(ValueError, match="exists already; name a new folder"):
        transform(source, source, Renumber(), plan=plan)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        transform(tmp_path / "no", tmp_path / "b", Renumber(), plan=plan)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "num_local_experts": 8}))
    with pytest.raises(ValueError, match=r"missing tensors|has shape"):
        transform(source, tmp_path / "b", Renumber(), plan=plan)
    (source / "config.json").write_text(json.dumps({**values, "model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type='gpt2', which is not a known family"):
        transform(source, tmp_path / "b", Renumber(), plan=plan)
    assert not list(tmp_path.glob("b*"))
    assert not list(tmp_path.glob("a.*"))


def test_what_computes_something_else_than_it_promised_is_not_kept(tmp_path: Path) -> None:
    class Lying(Measured):
        def changes_function(self) -> str | None:
            return None

    source = save_family(tmp_path / "a")
    with pytest.raises(ValueError, match="does not compute the same"):
        transform(source, tmp_path / "b", Lying(scale=0.5), plan=[], compare=True)
    assert not list(tmp_path.glob("b*"))


def test_memory_holds_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are made one after another, each from what it needs alone."""
    alive: list[int] = []
    original = ShardReader.tensor

    def tensor(self: ShardReader, key: str) -> torch.Tensor:
        found = original(self, key)
        alive.append(found.untyped_storage().nbytes())
        return found

    source = save_ours(tmp_path / "a", save_family(tmp_path / "f"))
    monkeypatch.setattr(ShardReader, "tensor", tensor)
    transform(source, tmp_path / "b", Renumber(), plan=plan_of(WHOLE_GROUPS))
    assert len(alive) == len(ShardReader(source).keys())  # each was read once
