"""Figures of the quality page, from the same rows as its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from etr.files import write_text
from etr.report.statistics import mean, t_interval
from etr.study.collection import Collection
from etr.study.summary import StudyRow

MARKERS = {"steps": "o", "expert_flops": "s", "seconds": "^"}
NAMES = {"steps": "equal steps", "expert_flops": "equal expert FLOPs", "seconds": "equal time"}
FRAME_COLORS = {
    "linear": "#59636d",
    "fixed": "#0067b1",
    "learned": "#c04a05",
    "orthonormal": "#00805f",
}


def draw(study: Collection, reference: str, folder: Path) -> dict[str, Path]:
    """Write every figure whose rows are there, as SVG; paths by title."""
    found = {}
    for name, title, make in (
        ("quality-capacity", "Held-out loss as served against capacity, text-x", _capacity),
        ("quality-front", "Held-out loss as served against expert compute, text-x", _front),
        ("quality-time", "Held-out loss as served against time, headline rows", _time),
    ):
        svg = make(study, reference)
        if svg is not None:
            path = folder / f"{name}.svg"
            write_text(path, svg)
            found[title] = path
    return found


def _axes(width: float = 7.0, panels: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for each in axes:
        each.grid(color="#ebe9e4")
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    import io

    import matplotlib as mpl

    buffer = io.StringIO()
    # A fixed salt and no date: the same results give the same file.
    with mpl.rc_context({"svg.hashsalt": "etr", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    lines = (line.rstrip() for line in buffer.getvalue().splitlines())
    return "\n".join(lines) + "\n"


def _spread(row: StudyRow) -> tuple[float, float]:
    """Mean loss and half-width of its interval."""
    values = list(row.losses().values())
    interval = t_interval(values)
    return mean(values), 0.0 if interval is None else (interval[1] - interval[0]) / 2


def _capacity(study: Collection, reference: str) -> str | None:
    figure, axes = _axes()
    drawn = False
    for router, color in FRAME_COLORS.items():
        rows = {
            factor: row
            for factor in (1.1, 0.6, 0.4, 0.2)
            if (row := study.row("text-x", f"{router}-{factor}")) is not None
        }
        if not rows:
            continue
        drawn = True
        spread = [_spread(row) for row in rows.values()]
        axes[0].errorbar(
            list(rows),
            [value for value, _ in spread],
            yerr=[width for _, width in spread],
            color=color,
            marker="o",
            capsize=3,
            label=router,
        )
    axes[0].set_xlabel("capacity factor (ranked by score, equal steps)")
    axes[0].set_ylabel("held-out loss, nats per byte")
    axes[0].legend(frameon=False)
    return _svg(figure) if drawn else None


def _front(study: Collection, reference: str) -> str | None:
    base = study.row("text-x", reference)
    if base is None:
        return None
    figure, axes = _axes(9.0)
    labelled: set[str] = set()
    for task, match, rows in study.blocks.values():
        for row in rows:
            flops = row.average("expert_flops") / base.average("expert_flops")
            loss = row.mean_loss()
            if task != "text-x" or loss is None or flops > 2:
                continue
            ours = row.name.startswith("etr") and row.name != "etr_paper"
            axes[0].plot(
                flops,
                loss,
                MARKERS[match],
                color="#c04a05" if ours else "#59636d",
                label=None if match in labelled else NAMES[match],
            )
            labelled.add(match)
            axes[0].annotate(
                row.name, (flops, loss), fontsize=6, xytext=(3, 3), textcoords="offset points"
            )
    axes[0].set_xlabel(f"expert FLOPs of training over those of {reference}")
    axes[0].set_ylabel("held-out loss, nats per byte")
    axes[0].legend(frameon=False)
    return _svg(figure)


def _time(study: Collection, reference: str) -> str | None:
    tasks = [task for task in ("text-x", "lm") if task in study.times]
    if not tasks:
        return None
    figure, axes = _axes(9.0, len(tasks))
    for panel, task in zip(axes, tasks, strict=True):
        base = study.row(task, reference)
        if base is None:
            return None
        for of, match, rows in study.blocks.values():
            for row in rows:
                ratio = study.seconds(task, row.name)
                if of != task or ratio is None or row.steps > 2 * base.steps:
                    continue
                points = [result["curve"] for result in row.results]
                x = [ratio * point["step"] / base.steps for point in points[0]]
                y = [mean([curve[i]["served_loss"] for curve in points]) for i in range(len(x))]
                panel.plot(x, y, marker=MARKERS[match], label=f"{row.name} ({NAMES[match]})")
        panel.set_title(task, fontsize=10)
        panel.set_xlabel(f"time over that of {reference}")
        panel.set_ylabel("held-out loss, nats per byte")
        panel.set_ylim(top=mean(list(base.losses().values())) + 0.4)
        panel.legend(frameon=False, fontsize=6)
    return _svg(figure)
