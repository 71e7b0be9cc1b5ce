"""Forms of ETR that were tried before the study, with seeds that the study does not use.

What won became the default of `etr`; what lost stays here, so that nobody need try it again
without knowing.
"""

from __future__ import annotations

from etr.study.grid import Block

SEED = 90
OTHER_SEED = 91
"""Of what a second look had to decide."""

_FREE = "etr_paper:frame=orthonormal,learn_temperature=true"
_SHARP = f"{_FREE},temperature=20"
_GATE = f"{_SHARP},score=prob"
_LINEAR = "token_choice/rank_by=score"


def _factor(value: float) -> str:
    return f"capacity=factor:capacity_factor={value}"


def _up(start: float, end: float, when: str = "") -> str:
    return f"capacity=schedule:start_factor={start},end_factor={end}{when}"


_ROWS: dict[int, tuple[str, ...]] = {
    500: (
        f"linear-1.1={_LINEAR}/{_factor(1.1)}",
        f"learned-temperature-10={_FREE}/{_factor(1.1)}",
        f"learned-temperature-20={_SHARP}/{_factor(1.1)}",
        f"learned-temperature-40={_FREE},temperature=40/{_factor(1.1)}",
        "fixed-learned-temperature-20=etr_paper:frame=fixed,learn_temperature=true,temperature=20"
        f"/{_factor(1.1)}",
        f"rank-by-gate-1.1={_FREE},score=prob/{_factor(1.1)}",
        f"rank-by-gate-temperature-20-1.1={_GATE}/{_factor(1.1)}",
        f"sigmoid-1.1={_FREE},gate=sigmoid/{_factor(1.1)}",
        f"linear-0.6={_LINEAR}/{_factor(0.6)}",
        f"linear-sigmoid-0.6=token_choice:gate=sigmoid/rank_by=score/{_factor(0.6)}",
        f"temperature-20-0.6={_SHARP}/{_factor(0.6)}",
        f"sigmoid-0.6={_FREE},gate=sigmoid/{_factor(0.6)}",
        f"sigmoid-temperature-20-0.6={_SHARP},gate=sigmoid/{_factor(0.6)}",
        f"rank-by-gate-0.6={_GATE}/{_factor(0.6)}",
        f"rank-by-gate-sigmoid-0.6={_GATE},gate=sigmoid/{_factor(0.6)}",
        f"sigmoid-0.3={_FREE},gate=sigmoid/{_factor(0.3)}",
        f"sigmoid-top2-0.3={_FREE},gate=sigmoid/top_k=2/normalize=none/{_factor(0.3)}",
        f"sigmoid-top2-0.55={_FREE},gate=sigmoid/top_k=2/normalize=none/{_factor(0.55)}",
        f"rank-by-cosine-up={_SHARP}/{_up(0.4, 1.1)}",
        f"rank-by-gate-up={_GATE}/{_up(0.4, 1.1)}",
        f"rank-by-gate-up-steep={_GATE}/{_up(0.3, 1.5, ',start=0.2,end=0.7')}",
        f"rank-by-gate-up-early={_GATE}/{_up(0.5, 1.5, ',start=0.0,end=0.5')}",
        f"rank-by-gate-up-aux-0.002={_GATE}/aux_alpha=0.002/{_up(0.4, 1.1)}",
        f"rank-by-gate-up-aux-0.03={_GATE}/aux_alpha=0.03/{_up(0.4, 1.1)}",
    ),
    1000: (
        f"linear-1.1={_LINEAR}/{_factor(1.1)}",
        "baseline=baseline",
        f"orthonormal-learned-temperature-1.1={_FREE}/{_factor(1.1)}",
        f"top2-chosen-0.55={_FREE}/top_k=2/{_factor(0.55)}",
        f"top2-none-0.55={_FREE}/top_k=2/normalize=none/{_factor(0.55)}",
        f"top4-none-0.27={_FREE}/top_k=4/normalize=none/{_factor(0.27)}",
        f"experts-choose-1.0={_FREE},choice=expert/{_factor(1.0)}",
    ),
    1100: (
        f"temperature-20-up={_SHARP}/{_up(0.4, 1.1)}",
        f"temperature-20-up-late={_SHARP}/{_up(0.25, 1.1, ',start=0.2,end=0.8')}",
    ),
    1300: (
        f"linear-up={_LINEAR}/{_up(0.4, 1.1)}",
        f"orthonormal-up={_FREE}/{_up(0.4, 1.1)}",
        f"top2-chosen-up={_FREE}/top_k=2/{_up(0.2, 0.6)}",
    ),
}


def _gate(temperature: float) -> str:
    """Ranked by gate, under the rising capacity, from a temperature."""
    return (
        f"rank-by-gate-temperature-{temperature:.3g}-up={_FREE},score=prob,temperature={temperature}"
        f"/{_up(0.4, 1.1)}"
    )


def _fixed_gate(temperature: float) -> str:
    """The same with the fixed frame."""
    return "fixed-" + _gate(temperature).replace("frame=orthonormal", "frame=fixed")


_TEMPERATURE_ROWS = (f"linear-1.1={_LINEAR}/{_factor(1.1)}", *map(_gate, (2 * 96**0.5, 9.8, 6.9)))
"""On text-x: twice, once and 0.7 times the square root of the width."""

_LANGUAGE_TEMPERATURE_ROWS = (
    f"linear-1.1={_LINEAR}/{_factor(1.1)}",
    f"linear-up={_LINEAR}/{_up(0.4, 1.1)}",
    *map(_gate, (2 * 128**0.5, 11.3, 8.0)),
    *map(_fixed_gate, (2 * 128**0.5, 11.3)),
)
"""The same on the language model."""

_LANGUAGE_ROWS = (
    f"linear-1.1={_LINEAR}/{_factor(1.1)}",
    f"fixed-1.1=etr_paper/{_factor(1.1)}",
    f"orthonormal-1.1=etr_paper:frame=orthonormal/{_factor(1.1)}",
    "fixed-rank-by-gate-temperature-23-1.1=etr_paper:learn_temperature=true,temperature=22.6,"
    f"score=prob/{_factor(1.1)}",
    f"rank-by-gate-temperature-11-1.1={_FREE},temperature=11.3,score=prob/{_factor(1.1)}",
    f"rank-by-gate-temperature-23-1.1={_FREE},temperature=22.627,score=prob/{_factor(1.1)}",
)


def _block(
    task: str, steps: int, rows: tuple[str, ...], seeds: tuple[int, ...] = (SEED,), what: str = ""
) -> Block:
    return Block(
        name=f"candidates{what}, {steps} steps",
        task=task,
        variants=rows,
        steps=steps,
        seeds=seeds,
        diagnostics=False,
    )


CANDIDATES = (
    *(_block("text-x", steps, rows) for steps, rows in _ROWS.items()),
    _block("lm", 150, _LANGUAGE_ROWS),
    _block("text-x", 500, _TEMPERATURE_ROWS, (SEED, OTHER_SEED), " for the temperature"),
    _block("lm", 400, _LANGUAGE_TEMPERATURE_ROWS, what=" for the temperature"),
    _block("lm", 490, (_gate(2 * 128**0.5),)),
)
