"""The program that `etr.evaluate.sandbox` starts: it puts up the walls, then plays its part.

It reads one line of JSON, the order, and writes one, {"missing": [...]}: which walls this system
did not give. Then it either runs a program and writes a second line, how that ended; or it loads an
answer, closes the report, and answers calls of one function over two pipes.
"""

from __future__ import annotations

import builtins
import json
import os
import sys

from . import limits, literals, namespaces, syscalls
from .view import Entry

TYPE_CHECKING = False  # each program starts anew, and `typing` would be a tenth of that
if TYPE_CHECKING:
    from typing import Any, BinaryIO

MESSAGE_BYTES = 2**22
"""Longest answer to a call."""
NO_ROOT = "no file system of its own, so that it could read this machine's files, tests among them"
NO_FILTER = "no filter of system calls"
PYTHON_ALONE = "files, processes and the network refused inside Python alone"
NO_MEMORY = "no limit on memory"
NO_PROCESSES = "no limit on processes, as root ran it"


def main() -> None:
    """Read the order, put up the walls, play the part."""
    order = json.loads(sys.stdin.buffer.readline())
    report = os.fdopen(order["report"], "w")
    try:
        missing = put_up_walls(order)
    except OSError as error:
        print(json.dumps({"error": str(error)}), file=report, flush=True)
        os._exit(1)
    print(json.dumps({"missing": missing}), file=report, flush=True)
    if order["part"] == "answer":
        report.close()
        serve(order)
    else:
        print(json.dumps(run(order)), file=report, flush=True)
    os._exit(0)  # no handler that the code registered runs


def put_up_walls(order: dict[str, Any]) -> list[str]:
    """Leave the machine's files, network and processes; returns what stays within reach."""
    alone = order["walls"] == "none"
    if order["walls"] == "namespaces":
        view = [Entry(*entry) for entry in order["view"]]
        namespaces.enter(view, order["folder"], order["folder_bytes"], lifeline=0)
    elif alone and sys.platform == "linux":
        namespaces.drop_rights()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    memory = limits.set_limits(order["memory_bytes"], order["file_bytes"], order["cpu_seconds"])
    missing = [] if memory else [NO_MEMORY]
    if alone:
        missing.append(NO_ROOT)
    if not syscalls.install(alone=alone):
        missing.append(PYTHON_ALONE if alone else NO_FILTER)
        missing += [NO_PROCESSES] * order["root"]
        if alone:
            sys.addaudithook(limits.audit_hook(os.getcwd()))
    return missing


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Run a program to its end; `candidate` is the function that another process answers for."""
    names: dict[str, Any] = {"__name__": "__main__"}
    if order["pipes"]:
        names["candidate"] = Candidate(*order["pipes"])
    try:
        exec(compile(order["code"], "program.py", "exec"), names)
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {describe(error)[1]}"}
    return {"passed": True}


def serve(order: dict[str, Any]) -> None:
    """Load an answer and answer calls of its function until there are no more."""
    reader, writer = order["pipes"]
    requests, replies = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
    names: dict[str, Any] = {"__name__": "__main__"}
    failed = None
    try:
        exec(compile(order["code"], "answer.py", "exec"), names)
        if order["function"] not in names:
            raise NameError(f"name {order['function']!r} is not defined")
    except BaseException as error:
        failed = describe(error)
    for line in requests:
        try:
            args, kwargs = literals.read(json.loads(line))
            result = None if failed else names[order["function"]](*args, **kwargs)
            reply = literals.write(("raised", failed) if failed else ("returned", result))
        except BaseException as error:
            reply = literals.write(("raised", describe(error)))
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


class Candidate:
    """A function that runs in another process; only literals go there and come back.

    Arguments are copies: what the function does to them is not seen here.
    """

    def __init__(self, writer: int, reader: int) -> None:
        self.requests: BinaryIO = os.fdopen(writer, "wb")
        self.replies: BinaryIO = os.fdopen(reader, "rb")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        text = json.dumps(literals.write(([*args], kwargs)))
        try:
            self.requests.write(text.encode() + b"\n")
            self.requests.flush()
        except BrokenPipeError:
            raise EOFError("the answer's process ended") from None
        line = self.replies.readline(MESSAGE_BYTES)
        if len(line) == MESSAGE_BYTES:
            raise ValueError(f"the answer returned more than {MESSAGE_BYTES} bytes")
        if not line.endswith(b"\n"):
            raise EOFError("the answer's process ended")
        ending, value = literals.read(json.loads(line))
        if ending == "returned":
            return value
        raise literals.error_named(*value)


def describe(error: BaseException) -> tuple[str, str]:
    """The builtin exception that this one is or extends, by name, and its first words."""
    kinds = type(error).__mro__
    name = next(kind.__name__ for kind in kinds if getattr(builtins, kind.__name__, None) is kind)
    try:
        return name, str(error)[:200]
    except BaseException:
        return name, "without words"
