"""A run's folder among ranks: rank 0 holds it for all, and all hear the same about damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gloo_ranks import spawn

from etr.files import read_json
from etr.parallel import Ranks, manifest
from etr.train.folders import writing

pytestmark = pytest.mark.distributed


def work(folder: str) -> dict[str, Any]:
    """What a rank meets in a folder that is held, in a free one, and in damaged ones."""
    ranks, found = Ranks.current(), dict[str, Any]()
    try:
        with writing(Path(folder) / "held", ranks):
            pass
    except ValueError as error:
        found["held"] = str(error)
    with writing(Path(folder) / "free", ranks):
        found["pids"] = ranks.gather(read_json(Path(folder) / "free" / ".lock.json")["pid"])
    for name in ("shape", "missing", "whole"):
        found[name] = manifest.find_damage(Path(folder) / name, ranks, (("a", "b"),))
    return found


def test_ranks_agree_about_a_folder(tmp_path: Path) -> None:
    for name in ("shape", "missing", "whole"):
        (tmp_path / name).mkdir()
        for file in "ac":
            (tmp_path / name / file).write_text(file)
        files = manifest.describe_files(tmp_path / name, Ranks(None))
        if name == "missing":
            (tmp_path / name / "c").unlink()
        text = "[]" if name == "shape" else str(files).replace("'", '"')
        (tmp_path / name / manifest.NAME).write_text(text)
    with writing(tmp_path / "held"):
        first, second = spawn(2, work, tmp_path / "ranks", str(tmp_path))
    assert first == second
    assert "locked by process" in first["held"]
    assert len(set(first["pids"])) == 1
    assert first["shape"] == "manifest.json is not a list of files with their sizes and checksums"
    assert first["missing"] == "c is missing"
    assert first["whole"] is None
