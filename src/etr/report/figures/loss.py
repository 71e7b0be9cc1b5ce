"""Loss against steps and against expert compute, and perplexity."""

import numpy as np

from etr.report.curves import Curve, CurveOf, evaluation_curve, gather, train_curve
from etr.report.lines import curve_numbers, line_chart, not_shown, values_domain
from etr.report.marks import rule
from etr.report.reading import headline
from etr.report.results import Results, Row
from etr.report.spec import Missing, Plot, Spec
from etr.report.summary import loss_note, summarize
from etr.report.wording import short

_NO_LOSS = "no run has a training loss in its metrics"
_LABEL = "cross-entropy (nats/token)"
_CAPTION = (
    "Means over seeds. Lines: training loss, a moving mean over a fortieth of the steps, the"
    " raw mean faint. Markers: held-out loss, experts selected as served."
)


def _by_steps(results: Results) -> Plot | Missing:
    variants = gather(results, train_curve("loss"), evaluation_curve())
    if not variants:
        return Missing(_NO_LOSS)
    domain, cut = values_domain(variants)
    return Plot(
        chart=line_chart(results, variants, {"title": _LABEL}, domain),
        caption=f"{_CAPTION}{cut}{not_shown(results, variants)}{loss_note(results)}",
        numbers=curve_numbers(results, _losses("step")),
        title=headline(summarize(results)),
    )


def _by_compute(results: Results) -> Plot | Missing:
    """The fair comparison where capacities differ."""
    pick = train_curve("loss", x="expert_flops")
    variants = gather(results, pick, evaluation_curve("expert_flops"))
    if not variants:
        return Missing(_NO_LOSS)
    least = min(float(variant.line.x[-1]) for variant in variants)
    domain, cut = values_domain(variants)
    x, end = "expert compute so far (FLOP)", {"data": {"values": [{}]}, **rule("x", least)}
    chart = line_chart(results, variants, {"title": _LABEL}, domain, x=x, more=[end])
    caption = (
        f"{_CAPTION} Compute counts kept tokens, forward and"
        f" backward. Dotted: the end of the thriftiest variant, {short(least)}FLOP; others"
        f" have not finished their schedule there.{cut}{not_shown(results, variants)}"
        f"{loss_note(results)}"
    )
    numbers = curve_numbers(results, _losses("expert_flops"), x="expert compute (FLOP)")
    return Plot(chart=chart, caption=caption, numbers=numbers)


def _perplexity(row: Row) -> Curve | None:
    curve = evaluation_curve()(row)
    # exp(20) is past anything that a vocabulary can reach.
    return curve and Curve(x=curve.x, y=np.exp(np.minimum(curve.y, 20.0)))


def _perplexity_by_steps(results: Results) -> Plot | Missing:
    variants = gather(results, _perplexity)
    if not variants:
        return Missing("no run has a held-out loss in its metrics")
    every = np.concatenate([variant.line.y for variant in variants])
    domain = float(every.min()) / 1.05, float(every.max()) * 1.05
    y = {"title": "held-out perplexity (log scale)", "format": "~s"}
    return Plot(
        chart=line_chart(results, variants, y, domain, smoothed=False, log=True),
        caption="Exponential of the held-out loss per token, experts selected as served; mean over"
        f" seeds.{not_shown(results, variants)}{loss_note(results)}",
        numbers=curve_numbers(results, {"held-out perplexity": _perplexity}),
    )


def _losses(x: str) -> dict[str, CurveOf]:
    return {
        "training loss (nats/token)": train_curve("loss", x=x),
        "held-out loss (nats/token)": evaluation_curve(x),
    }


BY_STEPS = Spec("loss-by-steps", "Loss against steps", "Quality", _by_steps)
BY_COMPUTE = Spec(
    "loss-by-compute", "Loss at equal expert compute", "Quality", _by_compute, compares=True
)
PERPLEXITY = Spec("perplexity", "Held-out perplexity", "Quality", _perplexity_by_steps)
