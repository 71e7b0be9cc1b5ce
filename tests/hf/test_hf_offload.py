"""Models whose experts do not fit: the same values, the replay's hits, and bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PAD, calibrated, make_model, quiet_eval, tokens
from torch import Tensor
from transformers import MixtralConfig

from etr.hf import EtrConfig, EtrForCausalLM, load_pretrained
from etr.hf.offload import Offload, banks, load_offloaded, resident_bytes, usage
from etr.moe.view import LayerView
from etr.moe.watch import watch
from etr.systems import CACHES, replay

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": 10**6}
POLICIES = [name for name, kind in CACHES.items() if not (kind.foresees or kind.predicts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts a layer, thresholds that drop some tokens, float64."""
    found = tmp_path_factory.mktemp("offload") / "model"
    model = make_model("etr", capacity="factor:capacity_factor=0.5", backend="loop")
    calibrated(model, steps=2).save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def whole(folder: Path) -> EtrForCausalLM:
    return load_pretrained(folder)


def padded() -> tuple[Tensor, Tensor]:
    ids = tokens(batch=3, length=9)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = PAD, 0
    return ids, mask


def run(model: EtrForCausalLM, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, attention_mask=mask, pad_token_id=PAD, **{**GREEDY, **options})


@pytest.mark.parametrize(
    ("where", "resident", "cache"),
    [("disk", 1, POLICIES[0]), *(("cpu", 3, name) for name in POLICIES), ("disk", 9, "lru")],
)
def test_values_and_tokens_do_not_change(
    where: Any, resident: int, cache: str, folder: Path, whole: EtrForCausalLM
) -> None:
    """A padded batch, bit for bit, however few experts are there."""
    model = load_offloaded(folder, Offload(where=where, resident=resident, cache=cache))
    assert type(model) is EtrForCausalLM
    assert not any(".experts." in name for name, _ in model.named_parameters())
    ids, mask = padded()
    with torch.no_grad():
        found, want = (m(input_ids=ids, attention_mask=mask).logits for m in (model, whole))
    assert torch.equal(found, want)
    assert torch.equal(run(model, ids, mask), run(whole, ids, mask))
    assert all(len(bank.memory.held) <= resident for _, bank in banks(model))
    used = usage(model)
    assert 0 < used.loads < used.uses


def test_search_goes_on_as_without(folder: Path, whole: EtrForCausalLM) -> None:
    model = load_offloaded(folder, Offload(resident=2))
    options = {"num_beams": 3, "cache_implementation": "static"}
    assert torch.equal(run(model, *padded(), **options), run(whole, *padded(), **options))


@pytest.mark.parametrize("moved", [False, True])
def test_a_read_that_fails_leaves_no_wrong_expert(
    moved: bool, folder: Path, whole: EtrForCausalLM
) -> None:
    """Ctrl-C or a lost disk in the middle of an expert, also while slots change their dtype."""
    model = load_offloaded(folder, Offload(resident=2))
    ids, mask = padded()
    _, bank = banks(model)[0]
    fetch = bank._fetch
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
        for part in range(1, 4):
            left = [part]

            def fail(name: str, expert: int, into: Tensor, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    into.fill_(torch.nan)
                    raise KeyboardInterrupt
                fetch(name, expert, into)

            bank._fetch = fail
            with pytest.raises(KeyboardInterrupt):
                (model.float() if moved else model)(input_ids=ids, attention_mask=mask)
            bank._fetch = fetch
            found = model.double()(input_ids=ids, attention_mask=mask).logits
            want = whole(input_ids=ids, attention_mask=mask).logits
            assert torch.equal(found, want) or moved  # float32 and back rounds the other weights
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe"])
def test_biases_clamps_and_shared_experts(family: str, tmp_path: Path) -> None:
    model = quiet_eval(make_model("token_choice", family, capacity="none"))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    model.save_pretrained(tmp_path)
    ids = tokens()
    with torch.no_grad():
        want = model(input_ids=ids).logits
        found = load_offloaded(tmp_path, Offload(resident=2))(input_ids=ids).logits
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cache", POLICIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_hits_are_those_of_a_replay(batch: int, cache: str, folder: Path) -> None:
    """A prompt in one pass, then a token at a time: of what the layers kept, in this order."""
    model = load_offloaded(folder, Offload(resident=2, cache=cache))
    passes: list[list[Tensor]] = [[], []]

    def see(place: int, view: LayerView) -> None:
        chosen = torch.where(view.selection.kept, view.routing.expert, -1)
        passes[place].append(chosen.view(view.routing.num_tokens, -1))

    ids, mask = padded()
    with watch(model, see):
        run(model, ids[-batch:], mask[-batch:])
    choices = torch.stack([torch.cat(layer) for layer in passes])
    lengths = torch.tensor([len(one) for one in passes[0]])
    forward = torch.arange(len(lengths)).repeat_interleave(lengths)
    want = replay(choices, CACHES[cache](), 2, num_experts=4, forward=forward)
    assert usage(model) == want
    elsewhere = CACHES[cache]().start(()).computes_elsewhere  # full at first, and misses stay out
    assert want.loads > (0 if elsewhere else 2 * 2)  # or the test would say nothing


PROGRAM = """
import json, resource, sys, torch
from etr.hf.offload import Offload, load_offloaded, resident_bytes
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
ids, options = torch.arange(3, 11)[None], {"do_sample": False, "eos_token_id": 999}
small, large = sys.argv[1:]
load_offloaded(small, Offload(resident=1)).generate(ids, max_new_tokens=2, **options)
before = peak()
model = load_offloaded(large, Offload(resident=2))
model.generate(ids, max_new_tokens=4, **options)
print(json.dumps({"grew": peak() - before, "bound": resident_bytes(model)}))
"""


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_memory_stays_under_the_stated_bound(tmp_path: Path) -> None:
    """In a process of its own, which has run a small model: the peak grows by no more than the
    bound, of 4 experts and the rest, and what an expert takes on its way; there are 32."""
    for name, width in (("small", 16), ("large", 4096)):
        base = MixtralConfig(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=16,
        )
        EtrForCausalLM(EtrConfig.from_base(base)).save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    expert = 3 * 64 * 4096 * 4  # bytes
    assert 4 * expert < found["bound"] < 5 * expert
    assert found["grew"] < found["bound"] + 3 * expert


def test_the_bound_is_that_of_all_tensors(folder: Path) -> None:
    model = load_offloaded(folder, Offload(resident=3))
    with torch.no_grad():
        model(input_ids=tokens())
    held = [*model.parameters(), *model.buffers()]
    held += [slot for _, bank in banks(model) for slot in bank._slots.values()]
    assert resident_bytes(model) == sum(t.numel() * t.element_size() for t in held)


def test_another_dtype_fills_the_slots_again(folder: Path) -> None:
    model, ids = load_offloaded(folder, Offload(resident=2)), tokens()
    with torch.no_grad():
        model(input_ids=ids)
        found = model.float()(input_ids=ids).logits
        want = load_pretrained(folder, torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resident": 0}, "resident=0 must be at least 1"),
        ({"resident": 1, "where": "tape"}, "where='tape' must be disk or cpu"),
        ({"resident": 1, "cache": "oracle"}, "cache='oracle' goes by what a text will use"),
        ({"resident": 1, "cache": "expertflow"}, "cache='expertflow' goes by what a text will use"),
        ({"resident": 1, "cache": "rlu"}, "cache='rlu' is unknown"),
    ],
)
def test_what_makes_no_memory_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Offload(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "nulls:count=2"}, "experts='nulls': only uniform experts can be offloaded"),
        ({"inner_steps": 2}, "inner_steps=2: steps that share their experts"),
    ],
)
def test_other_banks_and_training_are_refused(
    options: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    quiet_eval(make_model("token_choice", **options)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_offloaded(tmp_path, Offload(resident=1))
    model = load_offloaded(folder, Offload(resident=1))
    with pytest.raises(ValueError, match="experts that are offloaded cannot be trained"):
        model(input_ids=tokens())
    with pytest.raises(ValueError, match="a folder without them would be damaged"):
        model.save_pretrained(tmp_path / "new")
