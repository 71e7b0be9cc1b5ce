"""Numbers as people read them: one place for digits, signs, units and absence."""

from collections.abc import Sequence

ABSENT = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
NBSP = "\N{NO-BREAK SPACE}"
AT_MOST = f"\N{LESS-THAN OR EQUAL TO}{NBSP}"
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def fixed(value: float | None, digits: int) -> str:
    """Fixed decimals with thousands set apart and a true minus; `ABSENT` for None."""
    return ABSENT if value is None else _minus(f"{value:,.{digits}f}")


def signed(value: float | None, digits: int) -> str:
    """Like `fixed`, with a plus before what is above 0."""
    return ABSENT if value is None else _minus(f"{value:+,.{digits}f}")


def percent(value: float | None, digits: int = 1) -> str:
    """A share in percent."""
    return ABSENT if value is None else f"{fixed(100 * value, digits)}{NBSP}%"


def significant(value: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits, without exponent: 0.00123, 1.23, 12.3, 1,234."""
    if value is None:
        return ABSENT
    exponent = int(f"{abs(value):.{digits - 1}e}".split("e")[1]) if value else 0
    return fixed(value, min(max(digits - 1 - exponent, 0), 12))


def short(value: float | None, digits: int = 3) -> str:
    """A few significant digits with a unit prefix: 1234567 -> 1.23 M."""
    if value is None:
        return ABSENT
    scale, prefix = _prefix_of(value)
    text = _minus(f"{value / scale:.{digits}g}")
    return f"{text} {prefix}" if prefix else text


def _prefix_of(value: float) -> tuple[float, str]:
    """The largest of k, M, G, T, P, E that leaves at least 1, as (factor, letter)."""
    # 0.9995 so that what would be printed as 1000 takes the next prefix.
    return next(((f, p) for f, p in _PREFIXES if abs(value) >= 0.9995 * f), (1.0, ""))


def between(low: float, high: float, digits: int) -> str:
    """An interval of differences, both ends signed."""
    return f"{signed(low, digits)} to {signed(high, digits)}"


def listed(items: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def clipped(text: str, most: int) -> str:
    """At most `most` characters, the last an ellipsis where some were cut."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def clipped_inside(text: str, most: int) -> str:
    """At most `most` characters, an ellipsis in the middle where some were cut."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[-end:]}"


def sentence(text: str) -> str:
    """Put a capital at the start and a full stop at the end; nothing stays nothing."""
    return text and text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def counted(count: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _minus(text: str) -> str:
    # A signed zero would claim a difference where none is visible.
    if text[0] in "+-" and not any(mark in text for mark in "123456789"):
        return text[1:]
    return text.replace("-", MINUS)
