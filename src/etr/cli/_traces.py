"""Traces that belong together."""

from __future__ import annotations

from etr.trace import Trace, TraceInfo, read_trace


def same_model(path: str, like: TraceInfo, option: str) -> Trace:
    """Another trace of the model of a trace.

    Args:
        path: file.
        like: of the first trace.
        option: what errors call it.
    Raises:
        ValueError: it is of another model.
    """
    found = read_trace(path)
    for name in ("source", "router", "num_layers", "num_experts"):
        theirs, ours = getattr(found.info, name), getattr(like, name)
        if theirs != ours:
            raise ValueError(
                f"{option}={path!r} is a trace of another model: its {name} is {theirs!r}, that of "
                f"the first trace {ours!r}"
            )
    return found
