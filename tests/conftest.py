"""What every test shares: one thread, a seed of its own, memory filled with NaN on request."""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
import zlib
from collections.abc import Generator, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the processes that tests start, too

import pytest
import torch

torch.set_num_threads(1)
if not torch.accelerator.is_available():
    # Else each call keeps a stack trace for every kind of device, 0.7 ms.
    torch.manual_seed = torch.default_generator.manual_seed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measured", action="store_true", help="also run what takes training to see")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only `make criteria` runs; files with slow tests come first, so that two
    workers end together."""
    if not config.getoption("measured"):
        left_out = [item for item in items if item.get_closest_marker("measured")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("measured")]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Next to nothing that is imported or collected is garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """What is imported stays: collecting garbage need not walk over it, thousands of times.

    Loggers pass on what they get: pytest attaches its handlers to each that does not, and torch
    has forty, six times a test.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True
    _keep_instructions()


def _keep_instructions() -> None:
    """Dynamo keeps the instructions of 128 functions; a layer has more, so that none is found."""
    module = sys.modules.get("torch._dynamo.bytecode_transformation")
    kept = getattr(module, "_cached_cleaned_instructions", None)
    if hasattr(kept, "__wrapped__"):
        module._cached_cleaned_instructions = functools.cache(kept.__wrapped__)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run on one worker, in order; so do those of all files that start ranks."""
    from xdist.scheduler import LoadScopeScheduling

    @functools.cache
    def group(file: str) -> str:
        text = (config.rootpath / file).read_text(encoding="utf-8")
        return "ranks" if "mark.distributed" in text else file

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid.partition("::")[0])

    return ByFile(config, log)


def seed_of(node_id: str) -> int:
    """Seed of a test: another for every test and parameter, the same in every run."""
    return zlib.crc32(node_id.encode())


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch's global generator from the test's node id."""
    value = seed_of(request.node.nodeid)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True, scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the caches in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.append(("seed", f"torch.manual_seed({seed_of(item.nodeid)})"))
    return report


@pytest.fixture
def nan_filled_memory() -> Iterator[None]:
    """Memory from `torch.empty` holds NaN (integers: their maximum), so that any leak shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
