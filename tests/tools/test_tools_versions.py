"""The bounds of pyproject.toml, the lock, and what make installs, held together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import versions  # noqa: E402

REQUIREMENTS = [Requirement(text) for text in versions.direct()]
LOCK = {
    versions.normal(line.name): line
    for line in map(
        Requirement,
        (text for text in (ROOT / "constraints.txt").read_text().splitlines() if text[0] != "#"),
    )
}


def bounds(requirement: Requirement) -> dict[str, Version]:
    return {one.operator: Version(one.version) for one in requirement.specifier}


def locked(name: str) -> Version:
    return bounds(LOCK[versions.normal(name)])["=="]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda one: one.name)
def test_every_requirement_is_bounded_by_the_release_after_the_locked_one(
    requirement: Requirement,
) -> None:
    found = bounds(requirement)
    assert set(found) == {">=", "<"}, f"{requirement} needs a lower and an upper bound"
    if versions.NOT_LOCKED.fullmatch(requirement.name):
        return
    now = locked(requirement.name)
    assert now in requirement.specifier
    if requirement.name in versions.BY_MINOR:
        assert found["<"] == Version(f"{now.major}.{now.minor + 1}")
    else:
        assert found["<"] == Version(f"{now.major + 1}")


def test_one_package_has_one_range() -> None:
    names = [requirement.name for requirement in REQUIREMENTS]
    assert len(names) == len(set(names))


def test_the_lock_is_exact_and_of_no_machine() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert text.startswith(versions.HEADER)
    for name, line in LOCK.items():
        assert set(bounds(line)) == {"=="}, name
        assert not line.url
        assert locked(name).local is None, name
    assert not any(versions.NOT_LOCKED.fullmatch(name) for name in LOCK)


def test_the_install_page_installs_the_locked_torch() -> None:
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert f"pip install torch=={locked('torch')} --index-url" in text


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    lowest = {line.name: bounds(line)["=="] for line in map(Requirement, versions.lowest())}
    want = {one.name: bounds(one)[">="] for one in REQUIREMENTS}
    assert lowest.keys() == want.keys() - versions.NOT_LOWERED
    assert all(lowest[name] == want[name] for name in lowest)


def test_a_report_of_pip_becomes_a_lock() -> None:
    """The project itself, labels of local builds and what torch's GPU builds bring are left out."""

    def entry(name: str, version: str, **info: object) -> dict[str, object]:
        return {
            "metadata": {"name": name, "version": version},
            "download_info": {"url": "", **info},
        }

    report = {
        "install": [
            entry("torch", "2.13.0+cpu"),
            entry("etr-moe", "0.1.0", dir_info={"editable": True}),
            entry("PyYAML", "6.0"),
            entry("lm_eval", "0.4.13"),
            entry("nvidia-nccl-cu13", "2.29.7"),
            entry("triton", "3.7.1"),
        ]
    }
    assert versions.locked(report) == ["lm-eval==0.4.13", "pyyaml==6.0", "torch==2.13.0"]
