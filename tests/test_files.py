"""Files and folders that appear whole or not at all, whoever is killed meanwhile."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from etr import files
from etr.files import (
    find_object,
    put_back,
    read_object,
    remove_folder,
    remove_temporaries,
    set_aside,
    temporary_sibling,
    whole_file,
    whole_folder,
    write_text,
)


class Stop(Exception):
    pass


def fill_and_stop(path: Path) -> None:
    path.write_text("new")
    raise Stop


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_text(path, "old")
    with pytest.raises(Stop), whole_file(path) as temporary:
        fill_and_stop(temporary)
    assert path.read_text() == "old"
    assert names(path.parent) == ["a.json"]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stop), whole_folder(tmp_path / "a") as temporary:
        fill_and_stop(temporary / "x")
    assert names(tmp_path) == []


def test_a_folder_is_replaced_only_where_it_may_be(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for content in ("old", "new"):
        with whole_folder(folder, replace=True) as temporary:
            (temporary / content).touch()
        assert names(folder) == [content]
    with pytest.raises(OSError, match="not empty"), whole_folder(folder) as temporary:
        (temporary / "other").touch()
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("done", [1, 2], ids=["between the renames", "before the removal"])
def test_a_replacement_that_was_killed_is_undone_or_finished(tmp_path: Path, done: int) -> None:
    folder, new = tmp_path / "a", tmp_path / "new"
    for each in (folder, new):
        each.mkdir()
        (each / each.name).touch()
    os.replace(folder, set_aside(folder))
    if done == 2:
        os.replace(new, folder)
    for _ in range(2):
        put_back(folder)
        assert names(folder) == ["a" if done == 1 else "new"]
        assert not set_aside(folder).exists()


def test_a_replacement_that_fails_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "old").touch()
    move = os.replace

    def refuse(source: Path, target: Path) -> None:
        if target == folder and source != set_aside(folder):
            raise OSError("refused")
        move(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="refused"), whole_folder(folder, replace=True):
        pass
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["a"]


def test_temporary_names_are_unique_and_those_of_the_dead_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert temporary_sibling(path) != temporary_sibling(path)
    dead, alive, old = (temporary_sibling(path) for _ in range(3))
    other = temporary_sibling(tmp_path / "a.json.bak")
    for file in (dead, alive, other, tmp_path / ".tmp-a.json"):
        file.touch()
    old.mkdir()
    long_ago = dead.stat().st_mtime - files.LEFT_BEHIND_SECONDS - 1
    for file in (dead, old, other, tmp_path / ".tmp-a.json"):
        os.utime(file, (long_ago, long_ago))
    write_text(path, "x")
    assert names(tmp_path) == sorted([alive.name, other.name, "a.json"])
    remove_temporaries(tmp_path)
    assert names(tmp_path) == ["a.json"]
    remove_temporaries(tmp_path / "absent")


def test_a_removed_folder_is_gone_and_a_missing_one_no_error(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    remove_folder(tmp_path / "a")
    remove_folder(tmp_path / "a")
    assert names(tmp_path) == []


def _write(path: Path, letter: str) -> None:
    for _ in range(50):
        write_text(path, letter * 10_000)


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    """Each read finds all of one process's text; with a shared temporary name it would not."""
    path = tmp_path / "a"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(path, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            assert path.read_text() in ("a" * 10_000, "b" * 10_000)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("content", "found", "why"),
    [
        (b'{"a": NaN}', True, None),
        (b"[1]", False, "must hold a JSON object, not list"),
        (b'{"a": 1', False, "is not complete JSON .line 1, column 8"),
        (b'{"a": "\xff"}', False, "is not a text file in UTF-8 .byte 7"),
        (b"[" * 100_000, False, "is nested too deeply|recursion"),
    ],
)
def test_an_object_is_read_or_the_reason_given(
    tmp_path: Path, content: bytes, found: bool, why: str | None
) -> None:
    path = tmp_path / "a.json"
    assert find_object(path) is None
    path.write_bytes(content)
    assert (find_object(path) is not None) == found
    if why is not None:
        with pytest.raises(ValueError, match=rf"a\.json .*({why})"):
            read_object(path)
