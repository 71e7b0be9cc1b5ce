"""How figures look: one palette that colour-blind readers can tell apart, for light and dark.

Specifications name colours as CSS variables, so that the page's theme decides; for files of their
own `in_light` puts the light colours in their place.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from zlib import crc32


@dataclass(frozen=True, kw_only=True)
class Tint:
    """One colour in both themes."""

    variable: str
    """Name of the CSS variable."""
    light: str
    """On a light card, #rrggbb."""
    dark: str
    """On a dark card, #rrggbb."""

    @property
    def css(self) -> str:
        """The colour as a specification names it."""
        return f"var({self.variable})"


@dataclass(frozen=True, kw_only=True)
class Look:
    """How one variant looks in every figure."""

    tint: Tint
    """Colour."""
    dashes: tuple[float, ...]
    """Lengths of dash and gap in pixels; empty for a solid line."""
    shape: str
    """Vega's name of the marker."""


CARD = Tint(variable="--card", light="#fffefc", dark="#1a2025")
INK = Tint(variable="--ink", light="#1c242b", dark="#e8ebee")
SOFT = Tint(variable="--soft", light="#5a646e", dark="#a0abb5")
AXIS = Tint(variable="--axis", light="#b9bbb8", dark="#48525b")
GRID = Tint(variable="--grid", light="#ebe9e4", dark="#29313a")

# The baseline is grey, so that what is compared with it carries the colour.
_SERIES = (
    ("#59636d", "#aab4be"),
    ("#0067b1", "#62b3f4"),
    ("#c04a05", "#ff9457"),
    ("#00805f", "#41cda0"),
    ("#a8478a", "#ea9acb"),
    ("#8f6a00", "#e2b63c"),
    ("#0e8193", "#56cfe0"),
    ("#5a4bb8", "#ada2fa"),
)
SERIES = tuple(
    Tint(variable=f"--series-{index}", light=light, dark=dark)
    for index, (light, dark) in enumerate(_SERIES)
)
TINTS = (CARD, INK, SOFT, AXIS, GRID, *SERIES)
SANS = "DejaVu Sans, Verdana, sans-serif"
"""What figures are written in; a page takes its own letters, which are not wider."""

_DASHES: tuple[tuple[float, ...], ...] = ((), (7, 3), (2, 2.5), (9, 3, 2, 3))
_SHAPES = (
    *("circle", "square", "triangle-up", "diamond"),
    *("triangle-down", "cross", "triangle-right", "triangle-left"),
)
# Where the colour of a name is sought first, by the word that it begins with.
_HOMES = {
    "baseline": 0,
    "linear": 0,
    "etr": 1,
    "fixed": 1,
    "etr_paper": 2,
    "learned": 2,
    "locmoe": 3,
    "orthonormal": 3,
    "expert_choice": 4,
    "token_choice": 5,
    "hash": 6,
    "loss_free_balance": 7,
}
# Idle to overloaded, 1 (the mean load) in the middle; both ends differ in hue and the middle is
# a mid grey that neither theme swallows.
LOAD_MAP = ("#0b4f8a", "#6ba3cf", "#dcdad4", "#e29a63", "#a03c00")
# None to the most, of counts; 0 still differs from a light card.
COUNT_MAP = ("#eeece6", "#0b4f8a")


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Look of each variant, whatever its place; the first 60 differ.

    A name has a colour of its own, and takes another only where one that is earlier in the
    alphabet has it already.
    """
    found: dict[str, Look] = {}
    used = [0] * len(SERIES)
    order = list(dict.fromkeys(names))
    for name in sorted(order, key=lambda name: (name not in _HOMES, name)):
        home = _home(name)
        # Grey is the baseline's: the others go there last.
        slot = min(
            range(len(SERIES)),
            key=lambda slot: (used[slot] + 0.5 * (slot == 0 != home), (slot - home) % len(SERIES)),
        )
        lap, used[slot] = used[slot], used[slot] + 1
        found[name] = Look(
            tint=SERIES[slot],
            dashes=_DASHES[lap % len(_DASHES)],
            shape=_SHAPES[(slot + lap) % len(_SHAPES)],
        )
    return {name: found[name] for name in order}


def _home(name: str) -> int:
    word = re.split(r"[^a-z_]", name.rpartition("/")[2].lower(), maxsplit=1)[0]
    return _HOMES.get(word, 1 + crc32(name.encode("utf-8", "replace")) % (len(SERIES) - 1))


def theme_variables(dark: bool) -> str:
    """CSS declarations of all tints in one theme."""
    return "".join(f"{t.variable}:{t.dark if dark else t.light};" for t in TINTS)


def in_light(text: str) -> str:
    """A specification or an SVG with the light colours in place of the variables."""
    for tint in TINTS:
        text = text.replace(tint.css, tint.light)
    return text


_TEXT = {"labelColor": SOFT.css, "titleColor": SOFT.css, "labelFontSize": 11, "titleFontSize": 11.5}
CONFIG: dict[str, Any] = {
    "background": None,
    "font": SANS,
    "view": {"stroke": None},
    "mark": {"aria": False, "tooltip": None},
    "axis": {
        "aria": False,
        **_TEXT,
        "titleFontWeight": "normal",
        "titlePadding": 10,
        "domainColor": AXIS.css,
        "tickColor": AXIS.css,
        "gridColor": GRID.css,
        "labelLimit": 170,
    },
    "axisX": {"grid": False, "tickSize": 4, "labelFlush": True, "titleAnchor": "middle"},
    "axisY": {"domain": False, "ticks": False, "tickCount": 5},
    "header": {**_TEXT, "labelAnchor": "start", "labelPadding": 4, "labelOrient": "top"},
    "legend": {
        "aria": False,
        **_TEXT,
        "labelColor": INK.css,
        "gradientStrokeColor": AXIS.css,
        "orient": "top",
        "titleFontWeight": "normal",
        "symbolStrokeWidth": 2,
        "labelLimit": 190,
    },
    "facet": {"spacing": {"row": 14, "column": 18}},
}
"""Vega-Lite's config: the project's look."""
