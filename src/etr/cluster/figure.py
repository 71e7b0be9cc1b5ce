"""The all-to-all curve as a figure."""

from __future__ import annotations

from etr.cluster.measure import NetworkCurve
from etr.report.figure import Drawing, add_legend, new_figure
from etr.report.spec import Numbers
from etr.report.style import variant_style


def curve_drawing(curve: NetworkCurve) -> Drawing:
    """Seconds of an exchange against bytes per rank, measured and fitted; inside `house_style`."""
    figure = new_figure()
    (axes,) = figure.axes
    measured, fitted = variant_style(1), variant_style(2)
    axes.plot(
        curve.sizes, curve.seconds, color=measured.color, linestyle="none", marker=measured.marker
    )
    axes.plot(
        curve.sizes,
        [curve.line.seconds(size) for size in curve.sizes],
        color=fitted.color,
        linestyle=fitted.linestyle,
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("sent by each rank (bytes)")
    axes.set_ylabel("time until the last rank is done (s)")
    add_legend(figure, [("measured", measured)], lines=False)
    return Drawing(
        key="all-to-all",
        title=f"An exchange of {len(curve.node_of_rank)} ranks",
        section="Time and memory",
        caption="Time of an all-to-all in equal parts, median over rounds; the line is the latency "
        f"{curve.line.latency_seconds * 1e3:.3g} ms plus the bytes at "
        f"{curve.line.bytes_per_second / 1e6:.4g} MB/s.",
        figure=figure,
        numbers=Numbers(
            columns=("bytes", "seconds", "fitted (s)"),
            rows=[
                (size, seconds, curve.line.seconds(size))
                for size, seconds in zip(curve.sizes, curve.seconds, strict=True)
            ],
        ),
        html=None,
    )
