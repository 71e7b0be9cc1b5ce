"""One step of a pipeline: one forward, one backward in turn, and what waits for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    num_stages, events = len(forward_seconds), list[Event]()
    orders = [order_of(stage, num_stages, micro_batches) for stage in range(num_stages)]
    free, place = [0.0] * num_stages, [0] * num_stages
    # When each micro-batch is ready for each stage, forward and backward; None: not yet known.
    ready: dict[str, list[list[float | None]]] = {
        kind: [[None] * micro_batches for _ in range(num_stages)]
        for kind in ("forward", "backward")
    }
    ready["forward"][0] = [0.0] * micro_batches
    spent = {"forward": forward_seconds, "backward": backward_seconds}
    while any(at < len(order) for at, order in zip(place, orders, strict=True)):
        for stage, order in enumerate(orders):
            while place[stage] < len(order):
                kind, number = order[place[stage]]
                begin = ready[kind][stage][number]
                if begin is None:
                    break
                begin = max(free[stage], begin)
                end = free[stage] = begin + spent[kind][stage]
                events.append(Event(stage, kind, number, begin, end))
                place[stage] += 1
                if kind == "forward" and stage == num_stages - 1:
                    ready["backward"][stage][number] = end
                elif kind == "forward":
                    ready[kind][stage + 1][number] = end + hop_seconds
                elif stage:
                    ready[kind][stage - 1][number] = end + hop_seconds
    return events


def chrome_trace(named: Mapping[str, Sequence[Event]]) -> dict[str, Any]:
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
