"""Where output is not a terminal, long work says how far it is."""

from __future__ import annotations

import io
import itertools
import logging
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import etr.cli
from etr.cli import _progress
from etr.cli._progress import (
    SILENCE,
    Pulse,
    bytes_progress,
    pulse,
    steps_progress,
    track,
    training_progress,
)
from etr.data import DataConfig, open_data

log = logging.getLogger("etr.some.module")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Output(io.StringIO):
    """A stream that sets an event at its first line."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.terminal, self.heard = terminal, threading.Event()

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        size = super().write(text)
        if "\n" in text:
            self.heard.set()
        return size


def test_lines_are_never_more_than_thirty_seconds_apart() -> None:
    clock, said = Clock(), list[tuple[float, str]]()
    beating = Pulse("etr some", lambda line: said.append((clock.now, line)), clock)

    def wait(seconds: float) -> bool:
        assert seconds > 0
        clock.now += seconds
        return clock.now > 1000 + 600

    beating.keep_on(wait)
    times = [1000.0, *(time for time, _ in said)]
    assert max(b - a for a, b in itertools.pairwise(times)) <= 30
    assert times[-1] > 1600 - 30
    assert said[0][1] == f"etr some: working ({SILENCE:.0f} s)"


def test_a_line_tells_what_was_logged_last() -> None:
    clock, said = Clock(), list[str]()
    beating = Pulse("etr some", said.append, clock)
    for step in range(3):
        beating.handle(logging.makeLogRecord({"msg": "step %d", "args": (step,)}))
    assert beating.beat() == SILENCE
    clock.now += SILENCE - 1
    assert beating.beat() == 1
    assert said == []
    clock.now += 1
    assert beating.beat() == SILENCE
    assert said == [f"etr some: step 2 ({SILENCE:.0f} s)"]


def run(monkeypatch: pytest.MonkeyPatch, verb: str, work: Callable[[list[str]], int]) -> int:
    """A verb that has only its name and `work`."""
    monkeypatch.setitem(sys.modules, f"etr.cli.{verb}", types.SimpleNamespace(run=work))
    return etr.cli.run(verb, [])


@pytest.mark.parametrize(("verb", "stream"), [("evaluate", "stdout"), ("generate", "stderr")])
def test_every_verb_says_that_it_works(
    verb: str, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Output()
    monkeypatch.setattr(sys, stream, output)
    monkeypatch.setattr(_progress, "SILENCE", 0.01)

    def work(arguments: list[str]) -> int:
        log.info("batch %d", 7)
        output.heard.clear()
        assert output.heard.wait(60)
        return 3

    assert run(monkeypatch, verb, work) == 3
    assert f"etr {verb}: batch 7 (" in output.getvalue()
    said = output.getvalue()
    log.info("after the end")
    assert output.getvalue() == said
    assert logging.getLogger("etr").level == logging.NOTSET
    assert not any(isinstance(h, Pulse) for h in logging.getLogger("etr").handlers)


@pytest.mark.parametrize(("terminal", "rank"), [(True, "0"), (False, "1")])
def test_nothing_is_said_on_a_terminal_or_by_other_ranks(
    terminal: bool, rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Output(terminal))
    monkeypatch.setenv("RANK", rank)
    with pulse("train"):
        assert not any(isinstance(h, Pulse) for h in logging.getLogger("etr").handlers)


def test_an_error_ends_the_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(arguments: list[str]) -> int:
        raise ValueError("on purpose")

    assert run(monkeypatch, "evaluate", work) == 2
    assert not any(isinstance(h, Pulse) for h in logging.getLogger("etr").handlers)


def test_bars_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "etr")
    with training_progress(8) as training:
        row = {"kind": "train", "step": 3, "loss": 2.5, "tokens_per_second": 10.0}
        training.step("etr 0", row)
    with bytes_progress("converting") as show_bytes:
        show_bytes(2_000_000, 8_000_000)
    with steps_progress("recovering", 9) as show_step:
        show_step(4, "loss 1.25")
    assert list(track("ab", "tracing", 2)) == ["a", "b"]
    assert caplog.messages == [
        "etr 0 step 3/8, loss 2.500  10 tok/s  drop 0.0%",
        "converting 2.0/8.0 MB",
        "recovering 4/9, loss 1.25",
        "tracing 1/2",
        "tracing 2/2",
    ]


def test_building_text_and_tokenizer_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "etr")
    config = DataConfig(tokenizer="bpe:300", max_bytes_per_domain=20_000, cache_dir=str(tmp_path))
    open_data(config)
    assert caplog.messages == [
        "reading text: builtin",
        *(f"collecting built-in text: {name}" for name in
          ("python", "cpp", "docs", "math", "arithmetic", "english")),
        "training a tokenizer of 300 tokens",
        "cutting text into tokens",
    ]  # fmt: skip
