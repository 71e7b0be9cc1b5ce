"""Peak memory over training."""

from etr.report.curves import train_curve
from etr.report.lines import plot_curve
from etr.report.results import Results
from etr.report.spec import Missing, Plot, Spec


def _draw(results: Results) -> Plot | Missing:
    return plot_curve(
        results,
        train_curve("memory_bytes", scale=2.0**-20),
        label="peak memory so far (MiB)",
        caption="Most memory held so far: of the device where there is one, else of the process."
        " Runs that train in turn in one process share it",
        lacking="no run has its memory in its metrics",
    )


SPEC = Spec("memory", "Peak memory", "Time and memory", _draw)
