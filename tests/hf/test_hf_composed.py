"""Composed models: each prompt continues as its member continues it alone; folders load again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import PAD, VOCAB, base_config, make_model, quiet_eval
from torch import Tensor

from etr.hf import EtrConfig, EtrForCausalLM
from etr.hf.composed import Composed, is_composed, load_composed, member_folder, write_composed
from etr.methods.composition import CompositionOfExperts
from etr.methods.fusion_route import FusionRoute
from etr.model import DECODINGS

PLAIN = DECODINGS.parse("plain")
OPTIONS: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": 5,
    "eos_token_id": 10**6,
    "pad_token_id": PAD,
}


def learned() -> dict[str, Tensor]:
    """Prompts of low tokens go to member 0, of high ones to member 1."""
    high = (torch.arange(VOCAB) >= VOCAB // 2).double()
    return {
        "weight": torch.stack([1 - high, high]),
        "bias": torch.zeros(2).double(),
        "member": torch.tensor([0, 1]),
        "general": torch.tensor(0),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("composed")
    sources = [root / "first", root / "second"]
    for seed, source in enumerate(sources):
        member = make_model("token_choice", capacity="none", seed=seed)
        quiet_eval(member).save_pretrained(source)
    write_composed(root / "both", CompositionOfExperts(), sources, learned(), {"made_of": ["x"]})
    return root / "both"


@pytest.fixture(scope="module")
def model(folder: Path) -> Composed:
    return quiet_eval(load_composed(folder).double())


def prompts() -> tuple[Tensor, Tensor]:
    """Three rows; the first two are padded on the left. Members 1, 0, 1 answer."""
    half = VOCAB // 2
    ids = torch.tensor([[PAD, PAD, 40, 41], [PAD, 3, 4, 5], [50, 51, 52, 53]])
    assert half < 40
    return ids, (ids != PAD).long()


def test_each_prompt_continues_as_with_its_member_alone(model: Composed) -> None:
    ids, mask = prompts()
    assert model.answering(ids, mask).tolist() == [1, 0, 1]  # type: ignore[union-attr]
    found = model.decode(PLAIN, ids, attention_mask=mask, **OPTIONS)
    for row, number in enumerate([1, 0, 1]):
        start = int((mask[row] == 0).sum())
        alone = model.members[number].generate(ids[row : row + 1, start:], **OPTIONS)
        assert torch.equal(found[row, start:], alone[0])
    one = model.decode(PLAIN, ids[1:2], attention_mask=mask[1:2], **OPTIONS)
    assert torch.equal(one[0], found[1])


def test_shorter_continuations_are_padded_and_sequences_stay_by_their_prompts(
    model: Composed,
) -> None:
    ids, mask = prompts()
    whole = model.decode(PLAIN, ids, attention_mask=mask, **OPTIONS)
    ends = int(whole[1, 5])  # member 0 stops there
    assert ends not in whole[[0, 2], 4:]
    found = model.decode(PLAIN, ids, attention_mask=mask, **{**OPTIONS, "eos_token_id": ends})
    assert found[1, 6:].tolist() == [PAD] * 3
    assert torch.equal(found[[0, 2]], whole[[0, 2]])
    beams = {**OPTIONS, "num_beams": 2, "num_return_sequences": 2}
    several = model.decode(PLAIN, ids, attention_mask=mask, **beams)
    assert torch.equal(several[::2, :4], ids)
    assert torch.equal(several[1::2, :4], ids)
    with pytest.raises(ValueError, match="return_dict_in_generate is for one model"):
        model.decode(PLAIN, ids, attention_mask=mask, return_dict_in_generate=True, **OPTIONS)


def test_a_folder_loads_as_it_was_written(folder: Path, model: Composed) -> None:
    assert is_composed(folder)
    assert not is_composed(member_folder(folder, 0))
    assert model.composition == CompositionOfExperts()
    assert all(torch.equal(model.learned[name], value) for name, value in learned().items())
    record = json.loads((folder / "composition.json").read_text())
    assert (record["members"], record["made_of"]) == (2, ["x"])


def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


def test_no_code_of_a_folder_runs(folder: Path, tmp_path: Path) -> None:
    copy = damaged(folder, tmp_path)
    for place in (copy, member_folder(copy, 0)):
        (place / "evil.py").write_text("raise SystemExit('it ran')")
    path = member_folder(copy, 0) / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    path.write_text(json.dumps(config))
    record = json.loads((copy / "composition.json").read_text())
    record["imports"] = [str(copy / "evil.py")]
    (copy / "composition.json").write_text(json.dumps(record))
    assert len(load_composed(copy).members) == 2
    record["composition"]["name"] = "evil"
    (copy / "composition.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"runs only when it is named: pass --import .*evil.py"):
        load_composed(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "is of format 2; this version reads 1"),
        ({"members": 0}, "must say a composition, and the number of its members"),
        ({"members": True}, "must say a composition"),
        ({"composition": "composition"}, "must say a composition"),
        ({"composition": {"name": "other"}}, "composition='other' is unknown"),
        ({"composition": {"name": "composition", "budget": -1}}, "budget=-1 must be >= 0"),
        ({"members": 1}, r"'member' names members \[0, 1\] of 1"),
    ],
)
def test_records_are_checked(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    copy = damaged(folder, tmp_path)
    record = json.loads((copy / "composition.json").read_text())
    (copy / "composition.json").write_text(json.dumps({**record, **changes}))
    with pytest.raises(ValueError, match=message):
        load_composed(copy)


def test_missing_and_foreign_parts_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = damaged(folder, tmp_path)
    path = copy / "learned.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:20])
    with pytest.raises(ValueError, match=r"learned.safetensors is damaged"):
        load_composed(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"learned.safetensors is missing"):
        load_composed(copy)
    path.symlink_to(folder / "learned.safetensors")
    with pytest.raises(ValueError, match="is a link to"):
        load_composed(copy)
    path.unlink()
    path.write_bytes(content)
    shutil.rmtree(member_folder(copy, 1))
    with pytest.raises(FileNotFoundError, match="member-1"):
        load_composed(copy)
    member_folder(copy, 1).symlink_to(member_folder(folder, 1))
    with pytest.raises(ValueError, match="member-1 is a link"):
        load_composed(copy)
    (copy / "composition.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no composition.json"):
        load_composed(copy)


@pytest.fixture(scope="module")
def together(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Composed:
    """A router of one layer, and the two members of two."""
    router = quiet_eval(
        EtrForCausalLM(
            EtrConfig.from_base(
                base_config(num_hidden_layers=1, hidden_size=16, num_attention_heads=2),
                "token_choice",
                capacity="none",
            )
        )
    )
    found = {"choice": torch.randn(2, 16)}
    target = tmp_path_factory.mktemp("together") / "all"
    sources = [member_folder(folder, number) for number in range(2)]
    write_composed(target, FusionRoute(), sources, found, {}, router=router)
    return quiet_eval(load_composed(target).double())


@torch.no_grad()
def by_hand(model: Composed, ids: Tensor, mask: Tensor) -> Tensor:
    """Greedy, the whole text anew for every token and model."""
    router, composition = model.router, model.composition
    assert router is not None
    assert isinstance(composition, FusionRoute)
    for _ in range(5):
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        own = router.model(input_ids=ids, **given).logits
        said = [one(input_ids=ids, **given).logits.log_softmax(-1) for one in model.members]
        found = composition.combine(own, router.scores(), torch.stack(said, 2))
        best = found[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, best], 1), torch.cat([mask, torch.ones_like(best)], 1)
    return ids


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_models_that_write_together_equal_a_plain_loop(
    options: dict[str, Any], together: Composed
) -> None:
    """Padded, with a cache for each of other sizes; and no row alone would have written that."""
    ids, mask = prompts()
    found = together.decode(PLAIN, ids, attention_mask=mask, **OPTIONS, **options)
    assert torch.equal(found, by_hand(together, ids, mask))
    for one in (together.router.model, *together.members):  # type: ignore[union-attr]
        assert not torch.equal(one.generate(ids, attention_mask=mask, **OPTIONS), found)
        assert not one._forward_hooks


def test_beams_move_the_caches_of_all_models(together: Composed) -> None:
    ids, mask = prompts()
    beams = {**OPTIONS, "num_beams": 3, "num_return_sequences": 3}
    wanted = together.decode(PLAIN, ids, attention_mask=mask, use_cache=False, **beams)
    assert torch.equal(together.decode(PLAIN, ids, attention_mask=mask, **beams), wanted)


def test_without_logits_of_its_own_the_router_writes_what_the_chosen_member_writes(
    together: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head of the router is tied to nothing here, so that zeros there leave its scores."""
    ids, mask = prompts()
    router = together.router
    assert router is not None
    head = router.model.lm_head
    monkeypatch.setattr(head, "weight", torch.nn.Parameter(torch.zeros_like(head.weight)))
    for number in range(2):
        only = torch.tensor([1.0, -1.0]).roll(number).expand(3, 1, 2)
        monkeypatch.setattr(router, "scores", lambda only=only: only.double())
        found = together.decode(PLAIN, ids, attention_mask=mask, **OPTIONS)
        alone: Any = together.members[number]
        assert torch.equal(found, alone.generate(ids, attention_mask=mask, **OPTIONS))


def test_folders_of_models_that_write_together_are_checked(
    together: Composed, folder: Path, tmp_path: Path
) -> None:
    ids, mask = prompts()
    assert together.answering(ids, mask) is None
    with pytest.raises(ValueError, match="decoding='scmoe' is for one model"):
        together.decode(DECODINGS.parse("scmoe"), ids, attention_mask=mask, **OPTIONS)
    router = together.router
    assert router is not None
    members: list[Any] = list(together.members)
    with pytest.raises(ValueError, match=r"'choice' has shape \(2, 16\); it must be \(1, 16\)"):
        Composed(FusionRoute(), members[:1], {"choice": torch.ones(2, 16)}, router.model)
    copy = damaged(folder, tmp_path)
    record = json.loads((copy / "composition.json").read_text())
    record["composition"] = {"name": "fusion_route"}
    (copy / "composition.json").write_text(json.dumps(record))
    with pytest.raises(FileNotFoundError, match="router"):
        load_composed(copy)


def test_members_of_other_vocabularies_are_refused(model: Composed) -> None:
    config = EtrConfig.from_base(base_config(vocab_size=VOCAB + 1), "token_choice")
    other = EtrForCausalLM(config)
    with pytest.raises(ValueError, match=f"vocabularies of .{VOCAB}, {VOCAB + 1}. tokens"):
        Composed(CompositionOfExperts(), [model.members[0], other], learned())  # type: ignore[list-item]
