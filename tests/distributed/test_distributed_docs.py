"""The page about ranks: its code runs, and its table knows every dispatcher."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from etr.moe import DISPATCHERS

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

from markdown_blocks import ROOT, blocks

PAGE = ROOT / "docs/distributed.md"


def test_the_blocks_run_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    launcher = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": 0}
    for name, value in {**launcher, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    code = "\n".join(block.text for block in blocks(PAGE, "python"))
    found: dict[str, object] = {}
    try:
        exec(compile(code, str(PAGE), "exec"), found)
        layer, alone = found["layer"], found["alone"]
        output = layer(torch.randn(32, 64))  # type: ignore[operator]
        assert output.hidden_states.shape == (32, 64)
        assert int(output.stats["bytes_between_nodes"]) == 0
        assert alone.selection_group is None  # type: ignore[attr-defined]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_the_table_holds_every_dispatcher() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name in DISPATCHERS:
        assert f"\n| `{name}` |" in text, name
