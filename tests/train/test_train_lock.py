"""One writer a folder: who is refused, who takes over, and what is left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
from contextlib import ExitStack
from multiprocessing.synchronize import Event
from pathlib import Path

import filelock
import pytest

from etr.files import temporary_sibling, write_json
from etr.train import lock
from etr.train.folders import making, writing
from etr.train.lock import locked


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 1.0)


def hold(path: Path, held: Event, done: Event) -> None:
    with locked(path):
        held.set()
        done.wait()


@pytest.mark.parametrize("killed", [True, False])
def test_another_process_is_refused_by_name_until_the_first_ends(
    tmp_path: Path, killed: bool
) -> None:
    path = tmp_path / "run" / ".lock"
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    writer = context.Process(target=hold, args=(path, held, done))
    writer.start()
    held.wait()
    words = f"process {writer.pid} on {socket.gethostname()}, .* end it, or name another folder"
    with pytest.raises(ValueError, match=words), locked(path):
        pass
    if killed:
        os.kill(writer.pid or 0, signal.SIGKILL)
    else:
        done.set()
    writer.join()
    with locked(path):
        assert json.loads(path.with_name(".lock.json").read_text())["pid"] == os.getpid()
    assert list(path.parent.iterdir()) == []


def test_the_same_process_holds_it_once(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path):
        with pytest.raises(ValueError, match=f"process {os.getpid()}"), locked(path):
            pass
        assert path.exists()
    with locked(path):
        pass


def note_of_another_machine(path: Path, renewed: int) -> None:
    values = {"host": "elsewhere", "pid": 7, "since": "noon", "renewed": renewed}
    write_json(path.with_name(f"{path.name}.json"), values)


def test_a_silent_writer_on_another_machine_is_dead(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    note_of_another_machine(path, 3)
    with locked(path):
        assert json.loads((tmp_path / ".lock.json").read_text())["host"] == socket.gethostname()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_on_another_machine_that_renews_its_note_is_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 60.0)
    path, stop = tmp_path / ".lock", threading.Event()

    def renew() -> None:
        count = 0
        while not stop.wait(0.01):
            note_of_another_machine(path, count := count + 1)

    note_of_another_machine(path, 0)
    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(ValueError, match="process 7 on elsewhere"), locked(path):
            pass
    finally:
        stop.set()
        thread.join()
    assert json.loads((tmp_path / ".lock.json").read_text())["host"] == "elsewhere"


def test_one_that_ends_while_it_is_looked_at_makes_room(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    note_of_another_machine(path, 0)
    timer = threading.Timer(0.1, (tmp_path / ".lock.json").unlink)
    timer.start()
    with locked(path):
        pass
    timer.join()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": 3}'])
def test_a_damaged_note_stops_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock.json").write_text(content)
    with locked(tmp_path / ".lock"):
        pass


def test_a_file_system_without_locks_is_guarded_by_the_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    path = tmp_path / ".lock"
    with ExitStack() as held:
        with pytest.warns(UserWarning, match=r"No locks available.*its note alone"):
            held.enter_context(locked(path))
        monkeypatch.setattr(lock, "SILENCE_SECONDS", 60.0)
        with (
            pytest.warns(UserWarning, match="its note alone"),
            pytest.raises(ValueError, match=f"process {os.getpid()}"),
            locked(path),
        ):
            pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"file.* cannot be written to"),
        writing(tmp_path / "file"),
    ):
        pass


def test_what_killed_writers_left_is_put_in_order(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    half, aside, whole = (
        checkpoints / name for name in (".tmp-step-00000008.12-aabbccdd", ".old-step-4", "step-2")
    )
    for folder in (half, aside, whole):
        folder.mkdir(parents=True)
        (folder / folder.name).touch()
    report = temporary_sibling(tmp_path / "run" / "report.html")
    temporary_sibling(tmp_path / "run" / "metrics.jsonl").touch()
    report.touch()  # by a verb that does not hold the folder
    with writing(tmp_path / "run"):
        assert sorted(path.name for path in checkpoints.iterdir()) == ["step-2", "step-4"]
        assert (checkpoints / "step-4" / ".old-step-4").exists()
    assert sorted(path.name for path in report.parent.iterdir()) == [report.name, "checkpoints"]


def test_a_folder_that_is_to_be_made_is_held_by_its_name(tmp_path: Path) -> None:
    with making(tmp_path / "new"):
        assert not (tmp_path / "new").exists()
        with pytest.raises(ValueError, match="locked by process"), making(tmp_path / "new"):
            pass
        with making(tmp_path / "other"):
            pass
    assert list(tmp_path.iterdir()) == []
