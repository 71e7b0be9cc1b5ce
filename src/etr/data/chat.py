"""A tokenizer's chat template, run in a process of its own.

A template is a program that came with a checkpoint. transformers runs it in a sandbox that keeps it
from the rest of Python, but not from running for ever or filling the memory, and nothing written in
Python can be sure to stop that in its own process. So another one runs it, which a watchdog ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 20.0
"""Longest time that a template takes for a conversation; milliseconds are usual."""
CHARACTERS = 20_000_000
"""Longest text that it writes."""
Chat = tuple[Sequence[dict[str, Any]], dict[str, Any]]
"""Turns, and options: add_generation_prompt, continue_final_message."""


class ChatTemplate:
    """Writes conversations as text by the tokenizer's template; use it in `with`, or close it.

    What it writes is what the tokenizer's `apply_chat_template` would with ``tokenize=False``.

    Args:
        tokenizer: with a chat template.
        seconds: longest time for one call; None for `SECONDS`.
        characters: longest text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        seconds: float | None = None,
        characters: int = CHARACTERS,
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = {"seconds": seconds or SECONDS, "characters": characters}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process; a later call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def write(self, chats: Sequence[Chat], tools: list[dict[str, Any]] | None = None) -> list[str]:
        """Conversations as texts, all within the limit of time.

        Args:
            chats: JSON-ready; at least one.
            tools: JSON schemas of the functions that the assistant may call.
        Raises:
            ValueError: the template cannot be run, refuses a conversation or does not end; one
                line.
        """
        try:
            template = self._tokenizer.get_chat_template(tools=tools)
            variables = {**self._tokenizer.special_tokens_map, "tools": tools}
            request = {
                "chats": [{"messages": list(turns), "options": more} for turns, more in chats],
                "common": {**variables, "chat_template": template},
                **self._limits,
            }
            line = json.dumps(request, default=str)
        except (ValueError, RecursionError) as error:
            raise ValueError(_one_line(str(error))) from error
        answer = self._ask(line)
        if "error" in answer:
            raise ValueError(f"its chat template fails: {_one_line(answer['error'])}")
        return [str(text) for text in answer["texts"]]

    def _ask(self, request: str) -> dict[str, Any]:
        if self._process is None:
            self._process = _start()
        began = time.monotonic()
        answer = _exchange(self._process, request)
        if answer is None:
            self.close()
            if time.monotonic() - began >= self._limits["seconds"]:
                raise ValueError(
                    f"its chat template does not end within {self._limits['seconds']:g} s"
                )
            raise ValueError("its chat template ended the process that ran it, perhaps by memory")
        return answer


def _start() -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OPENBLAS_NUM_THREADS": "1",  # each thread of NumPy's would take room
    }
    process = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("_chat_child.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        encoding="utf-8",
    )
    if _exchange(process) is None:
        process.communicate()
        raise ValueError(f"no process for chat templates: {sys.executable} does not start")
    return process


def _exchange(process: subprocess.Popen[str], request: str = "") -> dict[str, Any] | None:
    """Send a line and wait for one; None where the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if request:
            process.stdin.write(request + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
    except OSError:
        return None
    answer: dict[str, Any] | None = json.loads(line) if line.endswith("\n") else None
    return answer


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 500 else f"{words[:500]}..."
