"""Plain exports: transformers' own models with linear routers that compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import base_config, make_model, quiet_eval, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

import etr
from etr.hf import EtrConfig, EtrForCausalLM
from etr.hf.plain import PLAIN, export_plain, mean_inverse_norms, plain_config
from etr.moe import set_eval_selection

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
LINEAR = {
    "orthonormal": etr.EtrRouter(norm="assumed"),
    "fixed": etr.EtrRouter(frame="fixed", norm="assumed"),
    "learned": etr.EtrRouter(frame="learned", norm="assumed", learn_temperature=False),
    "linear": etr.TokenChoice(),
}
FAMILY_OF = {  # base family and normalisation to the family of the export
    ("mixtral", "chosen"): "mixtral",
    ("mixtral", "none"): "qwen2_moe",
    ("olmoe", "none"): "olmoe",
    ("qwen3_moe", "chosen"): "qwen3_moe",
    ("qwen2_moe", "none"): "qwen2_moe",
}


def save(folder: Path, router: Any, family: str = "mixtral", **options: Any) -> EtrForCausalLM:
    """A model with norms that are not 1, saved in float64."""
    model = make_model(router, family, **options)
    for name, value in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(value, mean=1.0, std=0.2)
        if "temperature" in name:
            torch.nn.init.constant_(value, 1.3)
    model.save_pretrained(folder)
    set_eval_selection(model, "dropless")
    return quiet_eval(model)


def logits(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=x).logits


def serve(folder: Path) -> Any:
    # Grouped products know no float64.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()


@pytest.mark.parametrize(("family", "normalize"), FAMILY_OF)
@pytest.mark.parametrize("router", LINEAR)
def test_linear_routers_are_served_exactly(
    router: str, family: str, normalize: str, tmp_path: Path
) -> None:
    model = save(tmp_path / "etr", LINEAR[router], family, normalize=normalize)
    report = export_plain(tmp_path / "etr", tmp_path / "plain")
    assert (report.same_function, report.reason) == (True, "")
    assert report.family == FAMILY_OF[family, normalize]
    served, x = serve(tmp_path / "plain"), tokens()
    assert type(served).__module__.startswith("transformers.")
    # transformers runs the router's softmax in float32.
    assert torch.allclose(logits(model, x), logits(served, x), atol=1e-5)
    out = served.generate(x, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, model.generate(x, max_new_tokens=3, do_sample=False))


def test_the_norm_of_each_token_is_what_a_plain_router_lacks(tmp_path: Path) -> None:
    x = tokens(4, 16)
    model = save(tmp_path / "etr", etr.EtrRouter(), normalize="none")
    norms = mean_inverse_norms(model, [{"input_ids": x}])
    report = export_plain(tmp_path / "etr", tmp_path / "plain", inverse_norms=norms)
    assert not report.same_function
    assert "norm" in report.reason
    export_plain(tmp_path / "etr", tmp_path / "crude")
    exact = logits(model, x)
    fitted, crude = (
        float((logits(serve(tmp_path / name), x) - exact).abs().mean())
        for name in ("plain", "crude")
    )
    assert 0 < fitted < crude


def test_norms_of_one_make_any_cosine_router_linear(tmp_path: Path) -> None:
    """What the layer sees is then RMS-normalised without a weight, up to the norm's epsilon."""
    model = make_model(etr.EtrRouter(frame="fixed"), normalize="none")
    model.save_pretrained(tmp_path / "etr")
    set_eval_selection(model, "dropless")
    export_plain(tmp_path / "etr", tmp_path / "plain")
    x = tokens()
    assert torch.allclose(
        logits(quiet_eval(model), x), logits(serve(tmp_path / "plain"), x), atol=1e-3
    )


def test_slices_keep_their_scale(tmp_path: Path) -> None:
    base = base_config()
    moe = {"router": "token_choice", "capacity": "none", "routed_scale": 3.0}
    torch.manual_seed(0)
    model = quiet_eval(EtrForCausalLM(EtrConfig(base_config=base, moe=moe)).double())
    model.save_pretrained(tmp_path / "etr")
    export_plain(tmp_path / "etr", tmp_path / "plain")
    x = tokens()
    assert torch.allclose(logits(model, x), logits(serve(tmp_path / "plain"), x), atol=1e-5)


def test_assumed_norms_give_linear_logits() -> None:
    config = etr.MoEConfig(
        hidden_size=16, intermediate_size=8, num_experts=4, router=etr.EtrRouter(norm="assumed")
    )
    layer = etr.MoE(config).double()
    x = torch.randn(5, 16, dtype=torch.float64)
    inputs: Any = None
    one, three = (layer.router.scores(s * x, inputs).logits for s in (1.0, 3.0))
    assert torch.allclose(3 * one, three)
    unit = 4 * torch.nn.functional.normalize(x, dim=-1)  # norm sqrt(16)
    cosine = etr.MoE(etr.MoEConfig.from_dict({**config.to_dict(), "router": etr.EtrRouter()}))
    cosine.double().router.load_state_dict(layer.router.state_dict())
    found, same = (m.router.scores(unit, inputs).probs for m in (layer, cosine))
    assert torch.allclose(found, same)
    with pytest.raises(ValueError, match="norm='assumed' with score='cosine'"):
        etr.EtrRouter(norm="assumed", score="cosine")


@pytest.mark.parametrize(
    ("router", "options", "reason"),
    [
        (etr.EtrRouter(gate="sigmoid"), {}, "is not a softmax"),
        (etr.EtrRouter(choice="expert"), {}, "is not a softmax"),
        ("hash", {"losses": etr.LossConfig(aux_alpha=0.0)}, "is not a softmax"),
        (etr.TokenChoice(bias=True), {}, "is not a softmax"),
        ("etr", {"num_shared_experts": 1}, "num_shared_experts=1 where mixtral has 0"),
        ("etr", {"activation": "gelu"}, "activation='gelu'"),
    ],
)
def test_what_no_plain_family_holds_is_refused(router: Any, options: Any, reason: str) -> None:
    config = EtrConfig.from_base(base_config(), router, normalize="chosen", **options)
    with pytest.raises(ValueError, match=reason):
        plain_config(config)


def test_other_families_and_folders_are_refused(tmp_path: Path) -> None:
    assert set(PLAIN) == {*FAMILY_OF.values()}
    with pytest.raises(ValueError, match="base family is granitemoe"):
        plain_config(EtrConfig.from_base(base_config("granitemoe"), "etr"))
    save(tmp_path / "etr", "token_choice", normalize="chosen")
    export_plain(tmp_path / "etr", tmp_path / "plain")
    with pytest.raises(ValueError, match="so it is plain already"):
        export_plain(tmp_path / "plain", tmp_path / "again")
    with pytest.raises(ValueError, match="inverse_norms has 1 values; the model has 2"):
        export_plain(tmp_path / "etr", tmp_path / "again", inverse_norms=[1.0])
