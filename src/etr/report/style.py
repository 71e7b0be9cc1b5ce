"""How figures look: one palette that colour-blind readers can tell apart, for light and dark.

Figures are drawn once, in the light colours. Inside a page every colour is replaced by a CSS
variable, so that the page's theme decides; files of their own keep the light colours and a card.
"""

from dataclasses import dataclass
from typing import Any

from matplotlib.colors import LinearSegmentedColormap


@dataclass(frozen=True, kw_only=True)
class Tint:
    """One colour in both themes."""

    variable: str
    """Name of the CSS variable."""
    light: str
    """On a light card, #rrggbb."""
    dark: str
    """On a dark card, #rrggbb."""


@dataclass(frozen=True, kw_only=True)
class LineStyle:
    """How one variant looks in every figure."""

    tint: Tint
    """Colour."""
    dashes: tuple[float, ...]
    """Lengths of dash and gap in line widths; empty for a solid line."""
    marker: str
    """Matplotlib marker."""

    @property
    def color(self) -> str:
        """The light colour."""
        return self.tint.light

    @property
    def linestyle(self) -> Any:
        """Matplotlib line style."""
        return (0, self.dashes) if self.dashes else "solid"


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

_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.8), (1.2, 1.4), (6, 1.6, 1.2, 1.6))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")

# Idle to overloaded, 1 (the mean load) in the middle; both ends differ in hue and the middle is
# a mid grey that neither theme swallows.
LOAD_MAP = LinearSegmentedColormap.from_list(
    "load", ["#0b4f8a", "#6ba3cf", "#dcdad4", "#e29a63", "#a03c00"]
)


def variant_style(index: int) -> LineStyle:
    """Look of the variant at this place of the results; the first 64 differ."""
    lap = index // len(SERIES)
    return LineStyle(
        tint=SERIES[index % len(SERIES)],
        dashes=_DASHES[(index + lap) % len(_DASHES)],
        marker=_MARKERS[(index + lap) % len(_MARKERS)],
    )


def theme_variables(dark: bool) -> str:
    """CSS declarations of all tints in one theme."""
    return "".join(f"{t.variable}:{t.dark if dark else t.light};" for t in TINTS)


# Names of variants are printed as they are: a dollar sign starts no formula.
# Any: the names of the settings are a type of their own in some versions of matplotlib.
RC: Any = {
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "etr",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK.light,
    "figure.facecolor": "none",
    "figure.edgecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": AXIS.light,
    "axes.linewidth": 0.8,
    "axes.labelcolor": SOFT.light,
    "axes.labelsize": 9.5,
    "axes.titlecolor": INK.light,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID.light,
    "grid.linewidth": 0.8,
    "xtick.color": AXIS.light,
    "ytick.color": AXIS.light,
    "xtick.labelcolor": SOFT.light,
    "ytick.labelcolor": SOFT.light,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.minor.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "legend.labelcolor": INK.light,
    "legend.handlelength": 2.4,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.05,
}
