"""docs/methods.md says what the cards say, and the record of criteria is that of today's code."""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_blocks import ROOT

from etr.files import read_json
from etr.methods import BRANCHES, METHODS, Card
from etr.report import criteria
from etr.report.methods import methods_page, taxonomy

RECORD = ROOT / criteria.RECORD


def test_the_page_is_what_the_cards_make() -> None:
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert page == methods_page(criteria.statuses()), "run `make criteria`"


def test_every_method_was_tested_on_todays_files() -> None:
    record = read_json(RECORD)["methods"]
    assert set(record) == set(METHODS), "run `make criteria`"
    for name, card in METHODS.items():
        assert record[name]["sha256"] == criteria.digests(card, ROOT), f"{name}: `make criteria`"


def test_a_status_is_of_the_record_and_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Works only where it passed on these files; a changed test or row says so."""
    monkeypatch.setattr(criteria, "project", lambda: tmp_path)
    seen = {"a": "1", "b": "2"}
    monkeypatch.setattr(criteria, "digests", lambda card, root: dict(seen))
    assert set(criteria.statuses().values()) == {criteria.NEVER}
    path = tmp_path / criteria.RECORD
    path.parent.mkdir(parents=True)
    from etr.files import write_json

    write_json(path, criteria.record_of(tmp_path, {"etr": True, "hash": False}))
    found = criteria.statuses()
    assert (found["etr"], found["hash"]) == (criteria.WORKS, criteria.FAILS)
    assert found["locmoe"] == criteria.NEVER
    seen["b"] = "3"
    found = criteria.statuses()
    assert (found["etr"], found["hash"]) == (criteria.CHANGED, criteria.CHANGED)


def test_digests_are_of_the_method_and_its_test() -> None:
    assert set(criteria.digests(METHODS["locmoe"], ROOT)) == {
        "src/etr/methods/locmoe.py",
        "tests/methods/test_locmoe.py",
    }


def test_counts_by_branch_add_up() -> None:
    cells = [line.split("|")[1:-1] for line in taxonomy().splitlines()[2:]]
    levels = [int(count) for level, _, count, _ in cells if level.strip()]
    branches = [int(count) for level, _, count, _ in cells if not level.strip()]
    assert sum(levels) == sum(branches) == len(METHODS)


def test_the_worked_taxonomy() -> None:
    """A card of dynamic routing, of load balancing, of offloading, of quantization: two rows of the
    model's level, two of the system's, none of hardware's; a tag that is not of the set is refused,
    with the allowed ones."""
    tags = {
        "blocks": ("model", "dynamic routing"),
        "tuner": ("system", "load balancing"),
        "flow": ("system", "offloading and caching"),
        "quantized": ("model", "quantization"),
    }

    def card(name: str, level: str, branch: str) -> Card:
        words = {"title": name, "summary": name, "claim": "1.", "options": {"router": "hash"}}
        return Card(name=name, level=level, branch=branch, **words)

    cards = [card(name, *tag) for name, tag in tags.items()]
    cells = [line.split("|")[1:-1] for line in taxonomy(cards).splitlines()[2:]]
    counts = {level.strip(" *"): int(count) for level, _, count, _ in cells if level.strip()}
    assert counts == {"model": 2, "system": 2, "hardware": 0}
    assert [which.strip(" `") for level, _, _, which in cells if not level.strip()] == [
        "quantized",
        "blocks",
        "tuner",
        "flow",
    ]
    for name, (level, _) in tags.items():
        with pytest.raises(ValueError, match=f"card '{name}': branch='' must be one of ") as error:
            card(name, level, "")
        assert all(branch in str(error.value) for branch in BRANCHES[level])


def test_an_installed_copy_knows_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, "project", lambda: None)
    assert set(criteria.statuses().values()) == {criteria.NEVER}


def test_ranks_own_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    card = METHODS["hash"]
    values = {name: getattr(card, name) for name in card.__dataclass_fields__}
    monkeypatch.setitem(METHODS, "hash", Card(**{**values, "ranks": "own"}))
    assert "its own rank's tokens alone" in methods_page(criteria.statuses())
