"""Figures of many small panels, one or two per run: what all of them share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from etr.report.figure import new_figure
from etr.report.observations import Array, Diagnostics
from etr.report.results import Results, Row

T = TypeVar("T")
MOST_RUNS = 24
"""Runs that a figure with panels shows; more would make a page that nobody scrolls."""


@dataclass(frozen=True, kw_only=True)
class Found(Generic[T]):
    """What a figure shows of one run."""

    index: int
    """Place of the variant in the results, which decides its look."""
    name: str
    """The variant, with the seed where several seeds are shown."""
    row: Row
    """The run."""
    value: T
    """What was asked for."""


def first_of_each(results: Results, get: Callable[[Row], T | None]) -> list[Found[T]]:
    """The first seed of each variant that has it."""
    found = []
    for index, name in enumerate(results.names):
        for row in results.of(name):
            if (value := get(row)) is not None:
                found.append(Found(index=index, name=name, row=row, value=value))
                break
    return found


def every_run(results: Results, get: Callable[[Row], T | None]) -> list[Found[T]]:
    """Every run that has it; the seed is in the name where its variant has several."""
    return [
        Found(
            index=index,
            name=name if len(results.of(name)) == 1 else f"{name}, seed {row.seed}",
            row=row,
            value=value,
        )
        for index, name in enumerate(results.names)
        for row in results.of(name)
        if (value := get(row)) is not None
    ]


def last_diagnostics(row: Row, has: Callable[[Diagnostics], T | None]) -> T | None:
    """The newest diagnostics that hold what is asked for."""
    rows = row.metrics.diagnostics if row.metrics else ()
    return next((found for d in reversed(rows) if (found := has(d)) is not None), None)


def too_many(found: Sequence[Any]) -> str:
    """A sentence for the caption where runs are left out."""
    return f" The first {MOST_RUNS} of {len(found)} runs." if len(found) > MOST_RUNS else ""


def panels(count: int, columns: int, row_height: float, above: float = 0.3) -> tuple[Figure, Any]:
    """A grid with room for `count` panels; those left over are hidden.

    Args:
        count: panels.
        columns: panels in a row.
        row_height: inches.
        above: inches for what a figure needs besides its rows.
    Returns:
        The figure, and its axes as an array [rows, columns].
    """
    rows = -(-count // columns)
    figure = new_figure(rows, columns, height=above + row_height * rows)
    grid = np.array(figure.axes).reshape(rows, columns)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, grid


def draw_matrix(
    axes: Axes, matrix: Array, colors: Colormap, norm: Normalize, *, aspect: str = "equal"
) -> AxesImage:
    """A matrix as an image without frame, row 0 on top, whole numbers along both sides."""
    image = axes.imshow(
        matrix,
        aspect="equal" if aspect == "equal" else "auto",
        cmap=colors,
        norm=norm,
        interpolation="none",
    )
    frameless(axes)
    return image


def frameless(axes: Axes) -> None:
    """No grid, no frame, few whole ticks: for images."""
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def color_scale(figure: Figure, image: AxesImage, label: str, **options: Any) -> Any:
    """A colour bar beside all panels; returns it."""
    bar = figure.colorbar(image, ax=figure.axes, fraction=0.035, **options)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar
