"""Every transform of the shelf on a model of one expert, whose router has nothing to choose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_lm import made, plan_in, save, small, tokens

from etr.model import TRANSFORMS
from etr.model.transform import Renumber

pytestmark = pytest.mark.filterwarnings("ignore:MoE layer evaluates dropless")
NAMES = [name for name, kind in TRANSFORMS.items() if kind is not Renumber]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = small(num_local_experts=1, num_experts_per_tok=1)
    return save(model, tmp_path_factory.mktemp("one") / "model")


@pytest.mark.parametrize("name", NAMES)
def test_one_expert(name: str, source: Path, tmp_path: Path) -> None:
    """A plan is made, carried out and read; nothing divides by what there is not."""
    method, (given, more) = TRANSFORMS.parse(name), tokens()
    model, report = made(source, tmp_path / "new", method, batches=[given, more])
    with torch.no_grad():
        assert torch.isfinite(model(**given).logits).all()
    if name == "eaquant":
        assert plan_in(tmp_path / "new")["clip"] == [1.0, 1.0]  # all ranges are as good
    if report.same_function:
        want = small(num_local_experts=1, num_experts_per_tok=1)
        with torch.no_grad():
            torch.testing.assert_close(model(**given).logits, want(**given).logits)
