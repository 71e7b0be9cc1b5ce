"""Saving, loading, initial values, dtypes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import calibrated, etr_config, make_model, quiet_eval, router_and_family, tokens
from transformers import AutoModelForCausalLM

import etr
from etr.hf import FAMILIES, EtrConfig, EtrForCausalLM, load_pretrained
from etr.moe import attach, moe_layers
from etr.moe.state import GlobalState

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")


def states(model):
    """Every routing state tensor by name."""
    return {key: value for key, value in model.state_dict().items() if key in model.state_keys()}


def same(first, second):
    """Equal keys, dtypes and bits."""
    return first.keys() == second.keys() and all(
        first[key].dtype == second[key].dtype and torch.equal(first[key], second[key])
        for key in first
    )


@pytest.mark.parametrize(("router", "family"), router_and_family(etr.ROUTERS))
def test_saved_and_loaded_model_is_identical(router, family, tmp_path):
    model = calibrated(make_model(router, family), steps=2)
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), load_pretrained(tmp_path)):
        assert isinstance(loaded, EtrForCausalLM)
        assert loaded.dtype == torch.float64
        assert same(loaded.state_dict(), model.state_dict())
        for mine, theirs in zip(moe_layers(loaded), moe_layers(model), strict=True):
            assert mine.calibration.is_calibrated == theirs.calibration.is_calibrated
        with torch.no_grad():
            assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_sharded_saving(tmp_path):
    model = quiet_eval(make_model())
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(load_pretrained(tmp_path).state_dict(), model.state_dict())


def test_weights_keep_their_names_on_disk(tmp_path):
    model = make_model("token_choice")
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", ["etr", "etr_paper", "locmoe", "token_choice"])
def test_half_precision_keeps_the_state_exactly(router, dtype, tmp_path):
    model = calibrated(make_model(router))
    before = copy.deepcopy(states(model))
    model.save_pretrained(tmp_path)
    loaded = EtrForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert same(states(loaded), before)
    assert [x.calibration.is_calibrated for x in moe_layers(loaded)] == [True, True] or not any(
        x.traits.has_scores for x in moe_layers(loaded)
    )
    assert same(states(model.to(dtype)), before)
    assert torch.isfinite(loaded(tokens()).logits).all()


def test_checkpoint_without_state_warns_and_is_uncalibrated(tmp_path):
    model = calibrated(make_model())
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {k: v for k, v in load_file(path).items() if k not in model.state_keys()}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="lacks .* routing state"):
        loaded = load_pretrained(tmp_path)
    assert not any(layer.calibration.is_calibrated for layer in moe_layers(loaded))
    assert same(states(loaded), states(make_model()))


def test_single_missing_state_tensor_leaves_the_others(tmp_path):
    model = calibrated(make_model())
    model.save_pretrained(tmp_path)
    path, key = tmp_path / "model.safetensors", "model.layers.0.mlp.calibration.kept"
    weights = load_file(path)
    del weights[key]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"lacks 1 routing state.*calibration.kept"):
        loaded = load_pretrained(tmp_path)
    expected = states(model) | {key: torch.zeros(4)}
    assert same(states(loaded), expected)


@pytest.mark.parametrize(
    "router",
    [
        etr.EtrRouter(frame="learned"),
        etr.EtrRouter(gate="sigmoid"),
        "token_choice",
        "expert_choice",
    ],
)
def test_meta_start_leaves_nothing_uninitialised(router):
    config = etr_config(router)
    with torch.device("meta"):
        model = EtrForCausalLM(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 12345)
    torch.manual_seed(0)
    model.initialize_weights()
    torch.manual_seed(0)
    fresh = EtrForCausalLM(config)
    for (name, mine), (_, expected) in zip(
        (*model.named_parameters(), *model.named_buffers()),
        (*fresh.named_parameters(), *fresh.named_buffers()),
        strict=True,
    ):
        assert torch.equal(mine, expected) or torch.isnan(expected).all(), name
    assert not any(layer.calibration.is_calibrated for layer in moe_layers(model))


def test_same_seed_gives_the_same_other_weights_under_every_router():
    learned = etr.EtrRouter(frame="learned", gate="sigmoid")
    models = {router: make_model(router) for router in (*etr.ROUTERS, learned)}
    first = dict(models["etr"].named_parameters())
    for model in models.values():
        for name, weight in model.named_parameters():
            if ".router." not in name:
                assert torch.equal(weight, first[name]), name
    routers = [layer.router.weight for layer in moe_layers(models["token_choice"])]
    assert not torch.equal(*routers)


def test_experts_start_like_the_base():
    config = etr_config(backend="bmm")
    config.initializer_range = 0.02
    model = EtrForCausalLM(config)
    for layer in moe_layers(model):
        for weight in layer.experts.parameters():
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_tied_embeddings(tmp_path):
    config = etr_config()
    config.tie_word_embeddings = True
    model = quiet_eval(EtrForCausalLM(config))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_resized_vocabulary(tmp_path):
    model = quiet_eval(make_model())
    model.resize_token_embeddings(80)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.config.vocab_size == 80
    assert loaded(tokens()).logits.shape[-1] == 80


def test_router_options_of_a_missing_learned_weight(tmp_path):
    """One missing router tensor must not reset the one that was loaded."""
    model = make_model(etr.EtrPaper(frame="learned", learn_temperature=True))
    key = "model.layers.0.mlp.router.log_temperature"
    with torch.no_grad():
        moe_layers(model)[0].router.weight.fill_(0.5)
        moe_layers(model)[0].router.log_temperature.fill_(9.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    router = moe_layers(EtrForCausalLM.from_pretrained(tmp_path))[0].router
    assert torch.equal(router.weight, torch.full_like(router.weight, 0.5))
    assert router.log_temperature.item() == pytest.approx(0.5 * torch.tensor(32.0).log().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_can_be_copied_and_pickled(family):
    """Though its base model and decoder layers are of classes that are made as needed."""
    model = calibrated(make_model("etr", family), steps=2)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(copied.state_dict(), model.state_dict())
        assert [type(module) for module in copied.modules()] == [
            type(module) for module in model.modules()
        ]
        assert copied.prepare_context is copied.model.prepare_context is not model.prepare_context
        with torch.no_grad():
            assert torch.equal(copied(tokens()).logits, model(tokens()).logits)


@pytest.mark.slow
def test_another_process_reads_a_pickled_model(tmp_path):
    """Which has imported nothing yet, as a spawned one; a model that is attached, too."""
    model = make_model().train()
    attach(model, torch.optim.AdamW(model.parameters()), 4)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; model = torch.load(sys.argv[1] + '/model.pt', weights_only=False); "
        "model.eval(); ids = torch.arange(8)[None]; "
        "torch.save(model(ids).logits.detach(), sys.argv[1] + '/logits.pt')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True)
    with torch.no_grad():
        want = quiet_eval(model)(torch.arange(8)[None]).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("router", "family"), router_and_family(["etr", "etr_paper"]))
def test_a_model_can_be_made_in_any_dtype(router, family, dtype):
    config = etr_config(router, family)
    model = quiet_eval(AutoModelForCausalLM.from_config(config, dtype=dtype))
    assert model.dtype == dtype
    assert {value.dtype for value in states(model).values()} <= {torch.float32, torch.int64}
    assert torch.isfinite(model(tokens()).logits).all()


def without_dimensions(tensors):
    """As earlier versions wrote single numbers."""
    return {name: x.reshape(()) if x.shape == (1,) else x for name, x in tensors.items()}


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, load_pretrained])
def test_single_numbers_without_dimension_are_read(load, tmp_path):
    model = calibrated(make_model(etr.EtrRouter(gate="sigmoid")))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    earlier = without_dimensions(tensors)
    assert sum(not x.dim() and name not in model.state_keys() for name, x in earlier.items()) == 4
    save_file(earlier, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = quiet_eval(load(tmp_path))
    assert same(loaded.state_dict(), model.state_dict())
    loaded.save_pretrained(tmp_path / "again")
    assert same(load_file(tmp_path / "again" / "model.safetensors"), tensors)


class TestStrictLoading:
    """load_pretrained says what is wrong with a folder."""

    @pytest.fixture
    def folder(self, tmp_path):
        make_model("token_choice").save_pretrained(tmp_path)
        return tmp_path

    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            load_pretrained(tmp_path / "nowhere")

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
            load_pretrained(folder)

    def test_other_model_type(self, folder):
        etr_config().base_config.save_pretrained(folder)
        with pytest.raises(ValueError, match="model_type='mixtral'"):
            load_pretrained(folder)

    @pytest.mark.parametrize("keep", [0, 5, 0.5])
    def test_truncated_weights(self, folder, keep):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: int(keep if keep == 5 else keep * len(content))])
        with pytest.raises(ValueError, match="damaged"):
            load_pretrained(folder)

    def test_missing_router_weight(self, folder):
        path = folder / "model.safetensors"
        weights = load_file(path)
        del weights["model.layers.1.mlp.router.weight"]
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 missing .*layers\.1\.mlp\.router\.weight"):
            load_pretrained(folder)

    def test_weights_of_another_router(self, folder):
        etr_config("etr_paper").save_pretrained(folder)
        with (
            pytest.warns(UserWarning, match="lacks 4 routing state"),
            pytest.raises(ValueError, match=r"2 unexpected .*router\.weight"),
        ):
            load_pretrained(folder)

    def test_weights_of_other_sizes(self, folder):
        base = etr_config("token_choice").base_config
        base.intermediate_size = 96
        EtrConfig.from_base(base, "token_choice").save_pretrained(folder)
        with pytest.raises(ValueError, match="4 of another shape"):
            load_pretrained(folder)


def test_every_state_module_is_covered_by_state_keys():
    model = make_model()
    names = {name for name, _ in model.named_buffers() if ".mlp." in name}
    assert names == model.state_keys()
    assert sum(isinstance(m, GlobalState) for m in model.modules()) >= 6


def test_loading_is_silent_when_calibrated(tmp_path):
    calibrated(make_model()).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pretrained(tmp_path)
