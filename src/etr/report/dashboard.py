"""One frame of the live dashboard, for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from etr.prose import prose_text
from etr.report.live import LiveRow, LiveRun, value
from etr.report.wording import ABSENT, counted, fixed, percent, short

BLOCKS = " ▁▂▃▄▅▆▇█"
QUIET_SECONDS = 30.0
"""Silence after which a run is no longer called running, unless its steps are long."""
SHOWN_ALARMS = 5
WIDEST_BAR = 4
"""Columns of an expert's bar at most."""
LAYER_COLUMNS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "capacity": ("capacity", lambda tokens: fixed(tokens, 0)),
    "kept_affinity_mass": ("kept mass", percent),
}
"""What a layer may tell beside its load: key, heading, and how it reads."""


def dashboard(
    runs: Sequence[LiveRun], focus: LiveRun, *, now: float, width: int, height: int
) -> RenderableType:
    """A frame: the runs of a comparison, if several, and one run in detail.

    Args:
        runs: all runs.
        focus: the one in detail.
        now: seconds since the epoch.
        width, height: of the terminal; the number of layers shown depends on the height.
    """
    parts: list[RenderableType] = []
    if len(runs) > 1:
        parts.append(_runs(runs, focus, now))
    room = (
        height - 18 - (len(runs) + 2 if len(runs) > 1 else 0) - min(len(focus.alarms), SHOWN_ALARMS)
    )
    inside: list[RenderableType] = [_progress(focus, width), "", _loss(focus, width)]
    if focus.last:
        inside += ["", _numbers(focus.last, focus)]
        inside += _layers(focus.last, width, max(room, 4))
    if focus.alarms:
        inside += ["", _alarms(focus)]
    if focus.num_damaged:
        inside.append(Text(f"{counted(focus.num_damaged, 'line')} cannot be read", style="dim"))
    title, state = Text(str(focus.folder), style="bold"), Text(status(focus, now), style="cyan")
    parts.append(Panel(Group(*inside), title=title, subtitle=state, title_align="left"))
    return Group(*parts)


def status(run: LiveRun, now: float) -> str:
    """How the run is doing, in a few words."""
    if not run.last:
        return "waiting for the first step"
    if run.finished:
        return "finished"
    silence = now - (run.modified or now)
    if silence > max(QUIET_SECONDS, 10 * (run.step_seconds or 0.0)):
        return f"nothing new for {duration(silence)}"
    return "running"


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve in one line of text, lowest to highest; what is not finite leaves a gap."""
    points = _averaged(values, width)
    finite = [point for point in points if math.isfinite(point)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        BLOCKS[1 + round(7 * (point - low) / span) if span else 4] if math.isfinite(point) else " "
        for point in points
    )


def load_bars(choices: Sequence[float], width: int) -> Text:
    """Load of each expert as a bar; half height is the mean, full height twice the mean or more.

    Hardly used experts and overloaded ones are coloured. Few experts have wide bars; more experts
    than columns share one, which shows the largest.
    """
    mean = math.fsum(choices) / max(len(choices), 1)
    text = Text()
    step = math.ceil(len(choices) / max(width, 1)) or 1
    columns = max(min(width // max(len(choices), 1) - 1, WIDEST_BAR), 1)
    for first in range(0, len(choices), step):
        load = max(choices[first : first + step]) / mean if mean else 0.0
        style = "red" if load < 0.1 else "yellow" if load > 1.9 else "green"
        text.append(BLOCKS[max(1, round(4 * min(load, 2.0)))] * columns, style=style)
        text.append(" " * (columns > 1))
    return text


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds: 1:02:03, 2:03."""
    if seconds is None:
        return ABSENT
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _progress(run: LiveRun, width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    total = run.total_steps
    steps = f"step {run.step:,}" + (f"/{total:,}" if total else "")
    bar = ProgressBar(total=total or 1, completed=run.step if total else 0, width=width // 4)
    grid.add_row(
        Text(steps),
        bar,
        Text(f"{short(value(run.last, 'tokens'))} tokens"),
        Text(f"elapsed {duration(value(run.last, 'elapsed_seconds'))}"),
        Text(f"left {duration(run.seconds_left)}"),
    )
    return grid


def _loss(run: LiveRun, width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    curve = Text(sparkline(run.losses, max(width - 34, 10)), style="cyan")
    bound = " (upper bound)" if run.last.get("bound") else ""
    latest = f"{fixed(value(run.last, 'loss'), 4)} nats/token{bound}"
    grid.add_row(Text("loss", style="dim"), curve, Text(latest, style="bold"))
    found = [
        f"{fixed(value(row, 'val_loss'), 4)} {selection}, step {row.get('step')}"
        for selection, row in run.evaluations.items()
    ]
    if found:
        return Group(grid, Text(f"held out{bound}  " + "; ".join(found)))
    return grid


def _numbers(row: LiveRow, run: LiveRun) -> RenderableType:
    """The numbers of the latest step that are there."""
    memory = value(row, "memory_bytes")
    cells = {
        "speed": f"{fixed(run.tokens_per_second, 0)} tokens/s",
        "drop rate": percent(value(row, "drop_rate")),
        "MaxVio": fixed(value(row, "max_violation"), 2),
        "capacity": f"{fixed(value(row, 'capacity_mean'), 0)} tokens/expert",
        "without expert": percent(value(row, "tokens_without_expert")),
        "memory": None if memory is None else f"{short(memory)}B",
    }
    shown = {name: text for name, text in cells.items() if text is not None}
    grid = Table.grid(padding=(0, 3))
    grid.add_row(*(Text(name, style="dim") for name in shown))
    grid.add_row(*(Text(text, style="bold") for text in shown.values()))
    return grid


def _layers(row: LiveRow, width: int, most: int) -> list[RenderableType]:
    """Load bars of each layer; none where the row has no layers."""
    layers = row.get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        return []
    more = [key for key in LAYER_COLUMNS if any(value(layer, key) is not None for layer in layers)]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("layer", justify="right")
    table.add_column("load by expert")
    for name in ("MaxVio", "dropped", *(LAYER_COLUMNS[key][0] for key in more)):
        table.add_column(name, justify="right")
    for index, layer in enumerate(layers[:most]):
        choices, kept = _counts(layer, "choices"), _counts(layer, "tokens")
        total = math.fsum(choices)
        cells = [Text(str(index)), load_bars(choices, max(width - 58, 8))]
        if total:
            worst = max(choices) * len(choices) / total - 1
            cells += [Text(fixed(worst, 2)), Text(percent(1 - math.fsum(kept) / total))]
        else:
            cells += [Text(ABSENT), Text(ABSENT)]
        cells += [Text(LAYER_COLUMNS[key][1](value(layer, key))) for key in more]
        table.add_row(*cells)
    rest = len(layers) - most
    return ["", table, *([Text(f"and {counted(rest, 'layer')} more", style="dim")] * (rest > 0))]


def _counts(layer: LiveRow, what: str) -> list[float]:
    found = layer.get(f"num_{what}_per_expert")
    if not isinstance(found, list):
        return []
    return [float(count) for count in found if isinstance(count, int | float)]


def _alarms(run: LiveRun) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    shown = list(run.alarms)[-SHOWN_ALARMS:]
    for row in shown:
        layer = row.get("layer")
        grid.add_row(
            Text(f"step {row.get('step')}", style="dim"),
            Text("" if layer is None else f"layer {layer}", style="dim"),
            Text(str(row.get("name")), style="yellow"),
            prose_text(str(row.get("message", ""))),
        )
    earlier = run.num_alarms - len(shown)
    head = counted(run.num_alarms, "alarm") + (f", the latest {len(shown)}" if earlier else "")
    return Group(Text(head, style="yellow"), grid)


def _runs(runs: Sequence[LiveRun], focus: LiveRun, now: float) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("", "run", "step", "loss", "held out", "drop rate", "MaxVio", "tokens/s", ""):
        table.add_column(name, justify="left" if name in ("", "run") else "right", no_wrap=True)
    for run in runs:
        held_out = next(iter(run.evaluations.values()), {})
        table.add_row(
            "▸" if run is focus else "",
            Text(run.name),
            f"{run.step:,}" + (f"/{run.total_steps:,}" if run.total_steps else ""),
            fixed(value(run.last, "loss"), 3),
            fixed(value(held_out, "val_loss"), 3),
            percent(value(run.last, "drop_rate")),
            fixed(value(run.last, "max_violation"), 2),
            fixed(run.tokens_per_second, 0),
            Text(status(run, now), style="dim"),
        )
    return table


def _averaged(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means of neighbours; those of no finite value are NaN."""
    count = min(len(values), width)
    points = []
    for i in range(count):
        part = values[i * len(values) // count : (i + 1) * len(values) // count]
        finite = [v for v in part if math.isfinite(v)]
        points.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return points
