"""Which files of a folder count as a model: safetensors of the folder itself, and no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import etr_config, family_model, make_model, quiet_eval, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from etr.data import byte_tokenizer, load_tokenizer
from etr.hf import EtrConfig, EtrForCausalLM, convert, load_pretrained
from etr.hf.loading import load_base, load_causal
from etr.hf.plain import export_plain
from etr.hf.shards import INDEX, WEIGHTS, ShardReader
from etr.hf.upcycle import UpcycleConfig, upcycle
from etr.pretrained import from_local

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")

LOADERS: dict[str, Callable[[Path], Any]] = {
    "load_pretrained": load_pretrained,
    "load_causal": load_causal,
    "from_pretrained": EtrForCausalLM.from_pretrained,
    "auto": AutoModelForCausalLM.from_pretrained,
    "convert": lambda folder: convert(folder, folder.parent / "new"),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return quiet_eval(model)(tokens()).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that can be converted back, in one file."""
    make_model("keep").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def in_shards(folder: Path) -> Path:
    """The same model in two files and an index."""
    weights = load_file(folder / WEIGHTS)
    names = sorted(weights)
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        part = {name: weights[name] for name in names if where[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / WEIGHTS).unlink()
    return folder


def change_index(folder: Path, shard: str) -> None:
    values = json.loads((folder / INDEX).read_text())
    values["weight_map"][min(values["weight_map"])] = shard
    (folder / INDEX).write_text(json.dumps(values))


def other_weights(path: Path) -> None:
    """Weights of the same shapes with other values."""
    changed = {k: v + 1 if v.is_floating_point() else v for k, v in weights_of("keep").items()}
    save_file(changed, path, metadata={"format": "pt"})


def weights_of(router: str) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in make_model(router).state_dict().items()}


class TestOtherFiles:
    """Files beside the weights change nothing."""

    SPOILED: dict[str, Callable[[Path], Any]] = {  # noqa: RUF012
        "another safetensors": lambda f: other_weights(f / "model_backup.safetensors"),
        "a pickle": lambda f: torch.save({}, f / "pytorch_model.bin"),
        "a rank's shard": lambda f: other_weights(
            f / "shard-00001-model-00001-of-00001.safetensors"
        ),
        "a name in the config": lambda f: (
            other_weights(f / "other.safetensors"),
            edit(f / "config.json", transformers_weights="other.safetensors"),
        ),
        "an adapter": lambda f: (
            (f / "adapter_config.json").write_text(
                json.dumps({"peft_type": "LORA", "base_model_name_or_path": "../other"})
            ),
        ),
        "a config for another version": lambda f: (
            edit(f / "config.json", configuration_files=["config.5.0.0.json"]),
            make_model("etr").config.to_json_file(f / "config.5.0.0.json"),
        ),
    }

    @pytest.mark.parametrize("loader", ["load_pretrained", "load_causal"])
    @pytest.mark.parametrize("spoil", SPOILED)
    def test_they_are_not_read(self, loader: str, spoil: str, folder: Path) -> None:
        before = logits(LOADERS[loader](folder))
        self.SPOILED[spoil](folder)
        model = LOADERS[loader](folder)
        assert torch.equal(logits(model), before)
        assert model.config.name_or_path == model.name_or_path == str(folder)

    @pytest.mark.parametrize("loader", LOADERS)
    def test_a_stale_index_is_not_read(self, loader: str, folder: Path) -> None:
        """As transformers does: one file comes first."""
        stale = in_shards(Path(shutil.copytree(folder, folder.parent / "stale")))
        for path in stale.glob("model-*.safetensors"):
            values = {k: v + 1 for k, v in load_file(path).items()}
            save_file(values, folder / path.name, metadata={"format": "pt"})
        shutil.copy(stale / INDEX, folder)
        done = LOADERS[loader](folder)
        if loader == "convert":  # the family's experts know no float64
            done = load_causal(folder.parent / "new", torch.float32)
        found, expected = logits(done).double(), logits(make_model("keep"))
        exact = 1e-4 if loader == "convert" else 1e-9
        torch.testing.assert_close(found, expected, rtol=0, atol=exact)

    @pytest.mark.parametrize("loader", LOADERS)
    def test_pickles_alone_are_refused(self, loader: str, folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(weights_of("keep"), folder / "pytorch_model.bin")
        with pytest.raises(OSError, match=r"model\.safetensors"):
            LOADERS[loader](folder)
        with pytest.raises(FileNotFoundError, match=r"load pytorch_model\.bin with transformers"):
            load_pretrained(folder)

    @pytest.mark.parametrize("loader", LOADERS)
    def test_shards_are_read(self, loader: str, folder: Path) -> None:
        in_shards(folder)
        assert LOADERS[loader](folder)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class TestOutside:
    """Nothing outside of the folder is read."""

    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "a/b", "a\\b", 3])
    def test_an_index_stays_in_its_folder(self, loader: str, shard: Any, folder: Path) -> None:
        other_weights(folder.parent / "x.safetensors")
        where = str(folder.parent / "x.safetensors") if shard == "/x.safetensors" else shard
        change_index(in_shards(folder), where)
        with pytest.raises(ValueError, match="not the name of a file in its folder"):
            LOADERS[loader](folder)

    @pytest.mark.parametrize("loader", LOADERS)
    @pytest.mark.parametrize("name", [WEIGHTS, "config.json", "notes.txt"])
    def test_a_link_that_leaves_the_folder_is_refused(
        self, loader: str, name: str, folder: Path
    ) -> None:
        outside = folder.parent / "outside"
        outside.mkdir()
        if (folder / name).exists():
            shutil.move(folder / name, outside / name)
        else:
            (outside / name).write_text("secret")
        (folder / name).symlink_to(outside / name)
        with pytest.raises(ValueError, match=rf"{name} is a link to .*outside"):
            LOADERS[loader](folder)
        assert not (folder.parent / "new").exists()

    def test_links_that_stay_are_followed_and_loops_are_not(self, folder: Path) -> None:
        (folder / "real.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
        (folder / WEIGHTS).unlink()
        (folder / WEIGHTS).symlink_to("real.safetensors")
        (folder.parent / "name").symlink_to(folder)
        assert load_pretrained(folder.parent / "name")
        (folder / "loop").symlink_to("loop")
        with pytest.raises(ValueError, match="loop is a link"):
            load_pretrained(folder)

    @pytest.mark.parametrize("loader", LOADERS)
    def test_the_cache_of_hugging_face_is_read(self, loader: str, folder: Path) -> None:
        """It keeps files in blobs, and links to them in snapshots."""
        snapshot = as_in_cache(folder, "models--me--model")
        assert LOADERS[loader](snapshot)

    def test_blobs_of_another_model_are_not(self, folder: Path) -> None:
        snapshot = as_in_cache(folder, "models--me--model")
        other = folder.parent / "models--you--other" / "blobs"
        other.mkdir(parents=True)
        (other / "0").write_bytes((snapshot / WEIGHTS).read_bytes())
        (snapshot / WEIGHTS).unlink()
        (snapshot / WEIGHTS).symlink_to(other / "0")
        with pytest.raises(ValueError, match="is a link to"):
            load_pretrained(snapshot)

    def test_a_folder_that_only_looks_like_the_cache_is_not(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="is a link to"):
            load_pretrained(as_in_cache(folder, "data"))

    def test_a_tokenizer_has_the_same_rule(self, tmp_path: Path) -> None:
        byte_tokenizer().save_pretrained(tmp_path / "a")
        shutil.move(tmp_path / "a" / "tokenizer.json", tmp_path / "tokenizer.json")
        (tmp_path / "a" / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
        with pytest.raises(ValueError, match="is a link to"):
            from_local(AutoTokenizer, tmp_path / "a")
        with pytest.raises(FileNotFoundError, match="is a link to"):
            load_tokenizer(tmp_path / "a")


def as_in_cache(folder: Path, name: str) -> Path:
    """The folder's files as the Hugging Face cache lays them out."""
    root = folder.parent / name
    snapshot = root / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, root / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


class TestAnotherModelType:
    """A folder of another model is refused everywhere, with what to run."""

    ENTRANCES: dict[str, Callable[[Path], Any]] = {  # noqa: RUF012
        "EtrConfig.from_pretrained": EtrConfig.from_pretrained,
        "EtrConfig.from_dict": lambda f: EtrConfig.from_dict(read(f)),
        "EtrConfig.from_json_file": lambda f: EtrConfig.from_json_file(f / "config.json"),
        "EtrConfig": lambda f: EtrConfig(**read(f)),
        "EtrForCausalLM.from_pretrained": EtrForCausalLM.from_pretrained,
        "with a config": lambda f: EtrForCausalLM.from_pretrained(f, config=etr_config()),
        "with a name": lambda f: EtrForCausalLM.from_pretrained(f, config=str(f)),
        "auto with a config": lambda f: AutoModelForCausalLM.from_pretrained(
            f, config=etr_config()
        ),
        "in a subfolder": lambda f: EtrForCausalLM.from_pretrained(f.parent, subfolder=f.name),
        "load_pretrained": load_pretrained,
    }

    @pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
    @pytest.mark.parametrize("entrance", ENTRANCES)
    def test_it_is_refused(self, entrance: str, family: str, tmp_path: Path) -> None:
        family_model(family).save_pretrained(tmp_path / "a")
        with pytest.raises(ValueError, match=rf"model_type='{family}'.*`etr convert SRC DST`"):
            self.ENTRANCES[entrance](tmp_path / "a")

    def test_transformers_own_entrances_give_its_own_model(self, tmp_path: Path) -> None:
        theirs = family_model("mixtral")
        theirs.save_pretrained(tmp_path)
        assert type(AutoConfig.from_pretrained(tmp_path)) is type(theirs.config)
        for load in (AutoModelForCausalLM.from_pretrained, load_causal):
            model = load(tmp_path)
            assert type(model) is type(theirs)
            assert torch.equal(logits(model), logits(theirs))

    @pytest.mark.parametrize("lost", ["model_type", "base_config", "moe"])
    @pytest.mark.parametrize("entrance", [e for e in ENTRANCES if e not in ("EtrConfig",)])
    def test_half_a_config_is_not_filled_up(self, entrance: str, lost: str, tmp_path: Path) -> None:
        """A default one would have the sizes of Mixtral 8x7B."""
        make_model().save_pretrained(tmp_path / "etr")
        values = read(tmp_path / "etr")
        del values[lost]
        (tmp_path / "etr" / "config.json").write_text(json.dumps(values))
        message = "model_type=None" if lost == "model_type" else f"config has no {lost}"
        with pytest.raises(ValueError, match=message):
            self.ENTRANCES[entrance](tmp_path / "etr")


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_no_attention_kernel_is_fetched(folder: Path) -> None:
    edit(folder / "config.json", attn_implementation="somebody/kernel")
    with pytest.raises(ValueError, match="attn_implementation='somebody/kernel'"):
        load_pretrained(folder)


def test_a_loaded_model_has_the_options_of_its_generation(folder: Path) -> None:
    edit(folder / "generation_config.json", max_new_tokens=7)
    assert load_pretrained(folder).generation_config.max_new_tokens == 7
    (folder / "generation_config.json").unlink()
    assert load_pretrained(folder).generation_config.max_new_tokens is None


def test_a_model_without_head_and_one_of_no_language(tmp_path: Path) -> None:
    theirs = family_model("mixtral")
    theirs.save_pretrained(tmp_path / "a")
    base = load_base(tmp_path / "a")
    with torch.no_grad():
        expected = theirs.model(tokens()).last_hidden_state
        assert torch.equal(base(tokens()).last_hidden_state, expected)
    edit(tmp_path / "a" / "config.json", model_type="vit")
    with pytest.raises(ValueError, match="has no language model"):
        load_causal(tmp_path / "a")


@pytest.mark.parametrize("loader", [load_causal, load_base])
def test_damaged_weights_of_transformers_are_refused(loader: Any, tmp_path: Path) -> None:
    family_model("mixtral").save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        loader(tmp_path)


def test_upcycling_and_export_read_by_the_same_rule(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "a")
    make_model("token_choice").save_pretrained(tmp_path / "b")
    for name in "ab":
        change_index(in_shards(tmp_path / name), "../x.safetensors")
    with pytest.raises(ValueError, match="not the name of a file"):
        upcycle(tmp_path / "a", tmp_path / "c", UpcycleConfig(num_experts=2))
    with pytest.raises(ValueError, match="not the name of a file"):
        export_plain(tmp_path / "b", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_reading_holds_what_transformers_reads(tmp_path: Path) -> None:
    """Weights in another dtype, and of a family whose files name experts one by one."""
    theirs = family_model("qwen2_moe").bfloat16()
    theirs.save_pretrained(tmp_path)
    for dtype in (None, torch.float32):
        mine = load_causal(tmp_path, dtype).state_dict()
        same = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype or "auto").state_dict()
        assert set(mine) == set(same)
        for name, value in mine.items():
            assert value.dtype == same[name].dtype
            assert torch.equal(value, same[name]), name
    assert ShardReader(tmp_path).float_dtype() == torch.bfloat16
