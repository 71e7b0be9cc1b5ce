"""One step of a pipeline: one forward, one backward in turn, and what waits for what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Event(NamedTuple):
    """Something that a stage does."""

    stage: int
    kind: str
    micro_batch: int
    start_seconds: float
    end_seconds: float


def order_of(stage: int, num_stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """What a stage does in turn: some forwards, then pairs of both, then the backwards left."""
    ahead = min(num_stages - stage - 1, micro_batches)
    found = [("forward", number) for number in range(ahead)]
    for number in range(micro_batches - ahead):
        found += [("forward", ahead + number), ("backward", number)]
    return found + [("backward", number) for number in range(micro_batches - ahead, micro_batches)]


def run_pipeline(
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    hop_seconds: float,
    micro_batches: int,
) -> list[Event]:
    """Every forward and backward of a step, as soon as its order and what it needs allow.

    Args:
        forward_seconds, backward_seconds: of one micro-batch, for each stage.
        hop_seconds: of passing a micro-batch to the next stage.
        micro_batches: of the step.
    """
    num_stages = len(forward_seconds)
    waiting = [order_of(stage, num_stages, micro_batches)[::-1] for stage in range(num_stages)]
    free = [0.0] * num_stages
    done: dict[tuple[str, int, int], float] = {}
    events: list[Event] = []
    while any(waiting):
        for stage in range(num_stages):
            while waiting[stage]:
                kind, number = waiting[stage][-1]
                needed = _needed(kind, number, stage, num_stages)
                if needed is not None and needed not in done:
                    break
                ready = 0.0
                if needed is not None:
                    ready = done[needed] + (hop_seconds if needed[2] != stage else 0.0)
                start = max(free[stage], ready)
                spent = forward_seconds if kind == "forward" else backward_seconds
                free[stage] = start + spent[stage]
                done[kind, number, stage] = free[stage]
                events.append(Event(stage, kind, number, start, free[stage]))
                waiting[stage].pop()
    return events


def _needed(kind: str, number: int, stage: int, num_stages: int) -> tuple[str, int, int] | None:
    if kind == "forward":
        return (kind, number, stage - 1) if stage else None
    if stage == num_stages - 1:
        return "forward", number, stage
    return kind, number, stage + 1


def chrome_trace(named: dict[str, Sequence[Event]]) -> dict[str, Any]:
    """Steps as a file for trace viewers: a process for each name, a thread for each stage."""
    found: list[dict[str, Any]] = []
    for process, (name, events) in enumerate(named.items()):
        found.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
        found += [
            {
                "ph": "X",
                "name": event.kind
                if event.micro_batch < 0
                else f"{event.kind} {event.micro_batch}",
                "pid": process,
                "tid": event.stage,
                "ts": event.start_seconds * 1e6,
                "dur": (event.end_seconds - event.start_seconds) * 1e6,
            }
            for event in events
        ]
    return {"traceEvents": found, "displayTimeUnit": "ms"}


MARKS = {"forward": "F", "backward": "B", "reduction": "r", "optimizer": "o"}
"""A letter for each kind of event in `draw`."""


def draw(events: Sequence[Event], width: int = 72, end_seconds: float | None = None) -> str:
    """A step as text, a line for each stage; a dot is a device that waits.

    Args:
        events: of a step.
        width: characters of a line.
        end_seconds: time at the right end, the last event's if not given.
    """
    end = end_seconds or max(event.end_seconds for event in events)
    lines = [["."] * width for _ in range(max(event.stage for event in events) + 1)]
    for event in events:
        first, last = (round(t / end * width) for t in event[3:])
        lines[event.stage][first:last] = MARKS[event.kind] * len(lines[event.stage][first:last])
    return "\n".join(f"stage {number:2}  {''.join(line)}" for number, line in enumerate(lines))
